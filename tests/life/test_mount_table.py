"""Which mount a path leads to, by tables that Linux 6.1 and later have shown."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from caam_hotplug.kernel import mountinfo
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import DeviceNumber, Mapping, Mount
from caam_hotplug.volume.mount_table import cover_of, is_of, mounts_at

ROOT = Path("/mnt/media")
OURS = Mapping("caam-c-1-1", "CAAM-HOTPLUG-1-1", DeviceNumber(253, 1), (), 1)
OTHERS = Mapping("caam-d-2-1", "CAAM-HOTPLUG-2-1", DeviceNumber(253, 2), (), 1)
BELOW = """\
43 1 8:1 / / rw - ext4 /dev/sda1 rw
63 43 0:50 / /mnt rw shared:1 - tmpfs x rw
"""


class Table:
    """A kernel with these mounts."""

    def __init__(self, lines: str) -> None:
        self.mount_root = ROOT
        self._content = (BELOW + lines).encode()

    def mounts(self) -> list[Mount]:
        return mountinfo.parsed(self._content)


def numbers(lines: str, mapping: Mapping | None = None) -> list[int]:
    kernel = cast("Kernel", Table(lines))
    return [mount.identity for mount in mounts_at(kernel, "c", mapping)]


SHARED = """\
64 63 0:50 /media /mnt/media rw shared:1 - tmpfs x rw
65 64 253:1 / /mnt/media/c rw shared:2 - ext4 /dev/dm-1 rw
66 63 253:1 / /mnt/media/c rw shared:2 - ext4 /dev/dm-1 rw
"""
HIDDEN = """\
64 63 253:1 / /mnt/media/c rw shared:2 - ext4 /dev/dm-1 rw
65 63 0:50 /media /mnt/media rw shared:1 - tmpfs x rw
"""
TUCKED = """\
64 67 253:1 / /mnt/media/c rw shared:2 - ext4 /dev/dm-1 rw
65 63 0:50 /media /mnt/media rw shared:1 - tmpfs x rw
66 65 253:2 / /mnt/media/c rw shared:3 - ext4 /dev/dm-2 rw
67 63 253:2 / /mnt/media/c rw shared:3 - ext4 /dev/dm-2 rw
"""
STACKED = """\
64 63 253:1 / /mnt/media/c rw shared:2 - ext4 /dev/dm-1 rw
70 64 0:60 / /mnt/media/c rw shared:4 - tmpfs none rw
71 70 253:1 / /mnt/media/c rw shared:5 - ext4 /dev/dm-1 rw
"""


@pytest.mark.parametrize(
    ("lines", "seen"),
    [("", []), (SHARED, [65]), (HIDDEN, []), (TUCKED, [66]), (STACKED, [64, 70, 71])],
)
def test_only_mounts_that_the_path_leads_to_are_seen(lines: str, seen: list[int]) -> None:
    assert numbers(lines) == seen


@pytest.mark.parametrize(
    ("lines", "mapping", "found"),
    [
        (SHARED, OURS, [65]),
        (HIDDEN, OURS, [64]),
        (HIDDEN, OTHERS, []),
        (TUCKED, OTHERS, [66]),
        (TUCKED, OURS, [64]),
        (STACKED, OURS, [64, 70, 71]),
        (STACKED, OTHERS, [64, 70, 71]),
    ],
)
def test_a_hidden_mount_is_found_for_its_mapping(
    lines: str, mapping: Mapping, found: list[int]
) -> None:
    assert numbers(lines, mapping) == found


@pytest.mark.parametrize(
    ("lines", "of", "cover"),
    [(SHARED, 65, None), (SHARED, 66, 65), (HIDDEN, 64, 65), (TUCKED, 64, 66), (STACKED, 64, 71)],
)
def test_what_is_seen_instead_of_a_mount_is_its_cover(
    lines: str, of: int, cover: int | None
) -> None:
    mounts = Table(lines).mounts()
    (mount,) = (mount for mount in mounts if mount.identity == of)
    found = cover_of(mounts, mount)
    assert (None if found is None else found.identity) == cover


@pytest.mark.parametrize(
    ("line", "is_ours"),
    [
        ("9 1 253:1 / /a rw - ext4 /dev/dm-1 rw", True),
        ("9 1 0:70 / /a rw - btrfs /dev/dm-1 rw", True),
        ("9 1 0:70 / /a rw - btrfs /dev/mapper/caam-c-1-1 rw", True),
        ("9 1 0:70 / /a rw - btrfs /dev/dm-11 rw", False),
        ("9 1 0:70 / /a rw - fuse.sshfs /dev/dm-1 rw", False),
        ("9 1 0:70 / /a rw - fuseblk /dev/dm-1 rw", False),
        ("9 1 0:70 / /a rw - tmpfs /dev/mapper/caam-c-1-1 rw", False),
    ],
)
def test_a_source_counts_only_where_the_kernel_itself_writes_it(line: str, is_ours: bool) -> None:
    assert is_of(mountinfo.parse_mount(line), OURS) is is_ours


def test_a_table_without_any_of_the_agents_mounts_has_no_cover() -> None:
    mounts = Table("").mounts()
    assert [cover_of(mounts, mount) for mount in mounts] == [None, None]
