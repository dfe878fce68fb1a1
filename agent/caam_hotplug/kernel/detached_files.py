"""Files and directories of a filesystem whose mount was detached: their paths do not say so.

After a lazy unmount the kernel shows them relative to the root of that mount (prepend_path in
fs/d_path.c). So the device is asked of the file itself. That is not done where the path lies in
a filesystem that may wait for a server, and the answer is what the kernel knows without asking it
(AT_STATX_DONT_SYNC in statx(2)).
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Final

from caam_hotplug.kernel import mountinfo
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import DeviceNumber

_AT_FDCWD: Final = -100
_AT_STATX_DONT_SYNC: Final = 0x4000
_STATX_BYTES: Final = 256
_DEVICE: Final = struct.Struct("=136xII")
"""stx_dev_major and stx_dev_minor of struct statx (linux/stat.h)."""
_ANSWERS_AT_ONCE: Final = {
    "btrfs", "devtmpfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "overlay", "proc", "ramfs",
    "rootfs", "squashfs", "sysfs", "tmpfs", "vfat", "xfs",
}  # fmt: skip


def linked(
    process: Path, links: Iterable[Path], devices: Container[DeviceNumber]
) -> Iterator[Path]:
    """Yield those of a process's links that lead to a file on one of the devices.

    Raises: OSError; ValueError if its mounts cannot be read.
    """
    mounts = mountinfo.parsed((process / "mountinfo").read_bytes())
    waits = [m.point for m in mounts if m.filesystem not in _ANSWERS_AT_ONCE]
    rest = [m.point for m in mounts if m.filesystem in _ANSWERS_AT_ONCE]
    for link in links:
        try:
            path = str(link.readlink())
            is_at_once = path.startswith("/") and _longest(path, rest) > _longest(path, waits)
            if is_at_once and _device(link) in devices:
                yield link
        except OSError:  # it was closed, or this process may not see it
            continue


def mapped(process: Path, devices: Container[DeviceNumber]) -> Iterator[str]:
    """Yield the paths that the process has in memory from one of the devices. Raises: OSError."""
    for line in (process / "maps").read_text(errors="surrogateescape").splitlines():
        fields = line.split(None, 5)
        if len(fields) > 5:
            major, _, minor = fields[3].partition(":")
            if DeviceNumber(int(major, 16), int(minor, 16)) in devices:
                yield fields[5]


def _longest(path: str, points: list[str]) -> int:
    lies_in = (p for p in points if path == p or path.startswith(f"{p.rstrip('/')}/"))
    return max(map(len, lies_in), default=0)


def _device(link: Path) -> DeviceNumber:
    """Return the device of the file that a link in /proc leads to. Raises: OSError."""
    found = ctypes.create_string_buffer(_STATX_BYTES)
    Libc.statx(_AT_FDCWD, os.fsencode(link), _AT_STATX_DONT_SYNC, 0, found)
    return DeviceNumber(*_DEVICE.unpack_from(found))
