"""A device node that no other program sees, to write to a disk in use.

udevd watches the nodes in /dev. When one of a whole disk is closed after it was open for writing,
udevd has the kernel read the disk's partitions anew, by which all that are not in use go and come
(synthesize_change in udevd). A watch is on a node's inode (inotify(7)), and this node is another,
in a filesystem that is attached nowhere and ends with the process.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import Volume

_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_MOUNT_ATTRS: Final = 0x02 | 0x08
"""MOUNT_ATTR_NOSUID and NOEXEC of linux/mount.h."""
_NAME: Final = "disk"
_FLAGS: Final = os.O_RDWR | os.O_DIRECT | os.O_DSYNC | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def opened(disk: Volume) -> Iterator[int]:
    """Open the disk for reading and writing past the cache; a write is on the medium at once.

    Raises: KernelError. Source: fsopen(2), fsmount(2), mknodat(2).
    """
    with reported_as("open", disk.node):
        folder = _detached_folder()
        try:
            number = os.makedev(disk.number.major, disk.number.minor)
            os.mknod(_NAME, stat.S_IFBLK | 0o600, number, dir_fd=folder)
            file = os.open(_NAME, _FLAGS, dir_fd=folder)
        finally:
            os.close(folder)
    try:
        yield file
    finally:
        os.close(file)


def _detached_folder() -> int:
    """Return the root of a new filesystem in memory that is attached nowhere. Raises: OSError."""
    context: int = Libc.fsopen(b"tmpfs", _FSOPEN_CLOEXEC)
    try:
        Libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0)
        folder: int = Libc.fsmount(context, _FSMOUNT_CLOEXEC, _MOUNT_ATTRS)
    finally:
        os.close(context)
    return folder
