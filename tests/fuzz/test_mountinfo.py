"""Any line of mountinfo is a mount, or refused as a line that the kernel does not write."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from caam_hotplug.kernel import mountinfo
from caam_hotplug.model import Mount
from fuzz.inputs import mutated, tries

LINES: Final = [
    b"36 35 253:4 / /run/media/cartridge rw,nosuid shared:7 - ext4 /dev/dm-4 rw,errors=remount-ro",
    rb"36 35 0:40 / /mnt/a\040b\011c\012d\134e rw master:1 - tmpfs no\040device rw",
    "36 35 0:40 / /mnt/ü ro - fuse.x x\xff rw".encode("latin-1"),
    b"36 35 0:40 /@ /mnt rw - btrfs  rw,subvol=/@",
]


def parse_or_refuse(line: bytes) -> Mount | None:
    """Parse the line as `mounts` does; None where it was refused with what was expected."""
    text = line.decode(errors="surrogateescape")
    try:
        mount = mountinfo.parse_mount(text)
    except ValueError as error:
        assert str(error).startswith("expected a line of mountinfo")
        assert str(error).isprintable()
        assert len(str(error)) < 1000
        return None
    assert mount.number.major >= 0
    assert mount.number.minor >= 0
    assert len(mount.point) <= len(text)
    assert len(mount.source) <= len(text)
    return mount


@tries("mountinfo: any bytes", line=st.binary(max_size=120))
def test_any_bytes_are_a_mount_or_refused(line: bytes) -> None:
    parse_or_refuse(line)


@tries("mountinfo: a line of the kernel's, damaged", line=mutated(st.sampled_from(LINES)))
def test_a_damaged_line_is_a_mount_or_refused(line: bytes) -> None:
    parse_or_refuse(line)


fields = st.lists(
    st.sampled_from(
        ["36", "0:40", "8:17", "-1:2", "8:", ":", "8:1_0", "/", "-", "rw", "ro", "shared:1", "ext4",
         "/dev/sdb1", "\\040", "\\", "\\0", "\\04", "\\999", "\\777", "\\134134", "", "\udcff",
         "٧:٧"]
    ),
    max_size=14,
)  # fmt: skip


@tries("mountinfo: fields missing, doubled and wrong", parts=fields)
def test_fields_in_any_order_are_a_mount_or_refused(parts: list[str]) -> None:
    parse_or_refuse(" ".join(parts).encode(errors="surrogateescape"))


def escaped(name: bytes) -> bytes:
    """Escape a name as the kernel does (mangle_path in fs/seq_file.c, with the characters of
    show_mountinfo in fs/proc_namespace.c)."""
    return b"".join(b"\\%03o" % c if c in b" \t\n\\#" else bytes([c]) for c in name)


file_names = st.binary(max_size=40).map(lambda name: name.replace(b"\0", b""))


@tries("mountinfo: any name, and back", point=file_names, source=file_names)
def test_every_name_comes_back_byte_for_byte(point: bytes, source: bytes) -> None:
    line = b"36 35 8:17 / /%s rw - ext4 %s rw" % (escaped(point), escaped(source))
    mount = parse_or_refuse(line)
    assert mount is not None
    assert mount.point.encode(errors="surrogateescape") == b"/" + point
    assert mount.source.encode(errors="surrogateescape") == source
