from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.kernel import mountinfo
from caam_hotplug.model import DeviceNumber, Mount


def escaped(text: str) -> str:
    """Escape as the kernel writes a path into mountinfo (seq_path, mangle)."""
    return "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in text)


def test_a_line_gives_number_point_source_and_writability() -> None:
    line = "36 35 253:4 / /run/media/cartridge rw,nosuid - ext4 /dev/dm-4 rw,errors=remount-ro"
    assert mountinfo.parse_mount(line) == Mount(
        DeviceNumber(253, 4),
        "/run/media/cartridge",
        "/dev/dm-4",
        read_only=False,
        filesystem="ext4",
    )


@pytest.mark.parametrize(
    "optional", ["", "shared:1 ", "shared:1 master:2 ", "master:2 propagate_from:3 unbindable "]
)
def test_any_number_of_optional_fields_is_passed_over(optional: str) -> None:
    line = f"36 35 8:17 / /mnt ro,noatime {optional}- vfat /dev/sdb1 ro"
    assert mountinfo.parse_mount(line) == Mount(
        DeviceNumber(8, 17), "/mnt", "/dev/sdb1", read_only=True, filesystem="vfat"
    )


def test_escapes_of_blank_tab_newline_and_backslash_are_undone() -> None:
    line = r"36 35 0:40 / /mnt/a\040b\011c\012d\134e rw - tmpfs no\040device rw"
    mount = mountinfo.parse_mount(line)
    assert (mount.point, mount.source) == ("/mnt/a b\tc\nd\\e", "no device")


def test_an_escaped_backslash_before_digits_is_no_second_escape() -> None:
    line = r"36 35 0:40 / /mnt/a\134040b rw - tmpfs none rw"
    assert mountinfo.parse_mount(line).point == r"/mnt/a\040b"


def test_a_backslash_that_is_no_escape_stands_for_itself() -> None:
    line = r"36 35 0:40 / /mnt rw - cifs \\server\777\04 rw"
    assert mountinfo.parse_mount(line).source == r"\\server\777\04"


def test_a_mount_point_that_looks_like_the_separator_is_one_field() -> None:
    line = r"36 35 0:40 / /mnt/a\040-\040b rw shared:1 - tmpfs none rw"
    assert mountinfo.parse_mount(line).point == "/mnt/a - b"


def test_a_filesystem_that_fell_back_to_read_only_is_seen_as_such() -> None:
    line = "36 35 8:17 / /mnt rw,nosuid - ext4 /dev/sdb1 ro,errors=remount-ro"
    assert mountinfo.parse_mount(line).read_only


def test_an_option_that_only_contains_ro_leaves_it_writable() -> None:
    line = "36 35 8:17 / /mnt rw,nosymfollow - btrfs /dev/sdb1 rw,norecovery"
    assert not mountinfo.parse_mount(line).read_only


def test_a_mount_without_a_source_has_an_empty_one() -> None:
    assert mountinfo.parse_mount("36 35 0:40 / /mnt rw - tmpfs  rw").source == ""


@pytest.mark.parametrize(
    "line",
    [
        "",
        " - ",
        "36 35 8:17 / /mnt rw",
        "36 35 8:17 / - ext4 /dev/sdb1 rw",
        "36 35 8:17 / /mnt rw - ext4 /dev/sdb1",
        "36 35 8 / /mnt rw - ext4 /dev/sdb1 rw",
    ],
)
def test_a_line_that_the_kernel_does_not_write_is_refused_with_what_was_expected(
    line: str,
) -> None:
    with pytest.raises(ValueError, match=r"^expected a line of mountinfo such as .*, found ") as e:
        mountinfo.parse_mount(line)
    assert str(e.value).endswith(repr(line))


names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(names, names, st.booleans())
def test_every_point_and_source_comes_back_from_its_line(
    point: str, source: str, read_only: bool
) -> None:
    options = "ro,nosuid" if read_only else "rw,nosuid"
    line = f"36 35 8:17 / /{escaped(point)} {options} shared:9 - ext4 {escaped(source)} rw"
    assert mountinfo.parse_mount(line) == Mount(
        DeviceNumber(8, 17), f"/{point}", source, read_only, "ext4"
    )


def test_this_processs_mounts_have_the_root() -> None:
    assert "/" in [mount.point for mount in mountinfo.mounts()]
