"""The kernel's files of sysfs, below one descriptor, whatever is mounted at /sys.

What is read here decides whether a medium has gone. A path would answer ENOENT for every device
while /sys is unmounted or something covers it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from ctypes import c_long, create_string_buffer
from functools import cache
from typing import Final, TypeVar

from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.kernel.reserve import spent_on

T = TypeVar("T")

ABSENT: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ENXIO})
"""Error numbers with which the kernel says that a device or its file is not there, or no more."""
_MOUNT: Final = "/sys"
_SYSFS_MAGIC: Final = 0x62656572
_STATFS_ROOM: Final = 256
"""More than struct statfs has. It begins with the type of the filesystem (statfs(2))."""
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1
_FOR_READING: Final = 0x01 | 0x02 | 0x04 | 0x08
"""MOUNT_ATTR_RDONLY, NOSUID, NODEV and NOEXEC of linux/mount.h."""
_PAGE: Final = 4096
"""The most that an attribute has (sysfs.rst)."""


@cache
def root() -> int:
    """Return the descriptor of sysfs, opened by the first call and kept for good.

    Raises: KernelError if sysfs cannot be opened, or if the descriptor is not of sysfs.
    """
    opened = _opened()
    kind = create_string_buffer(_STATFS_ROOM)
    Libc.fstatfs(opened, kind)
    if c_long.from_buffer(kind).value != _SYSFS_MAGIC:
        os.close(opened)
        hint = f"something covers it: umount {_MOUNT}"
        raise KernelError("open the kernel's sysfs at", _MOUNT, errno.EINVAL, hint)
    return opened


def _opened() -> int:
    """Open sysfs: as a mount of this process's own, which nobody else can cover.

    Such a mount is in no mount table. A user without CAP_SYS_ADMIN gets the one at /sys.
    """
    try:
        context = Libc.fsopen(b"sysfs", _FSOPEN_CLOEXEC)
        try:
            Libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0)
            mounted: int = Libc.fsmount(context, _FSMOUNT_CLOEXEC, _FOR_READING)
        finally:
            os.close(context)
    except OSError:
        try:
            return os.open(_MOUNT, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            hint = f"mount it: mount -t sysfs sysfs {_MOUNT}"
            raise KernelError("open", _MOUNT, error.errno or 0, hint) from error
    return mounted


def known(subject: str, look: Callable[[], T]) -> T | None:
    """Return what the look finds; None if the kernel says that it is not there.

    Raises: UnknownError if the kernel says neither, such as for want of a file descriptor.
    """
    try:
        return look()
    except UnknownError:
        raise
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise UnknownError("look at", subject, error.errno or errno.EIO) from error
    except ValueError as error:
        raise UnknownError("look at", subject, errno.EBADMSG, str(error)) from error


def text(at: int, file: str) -> str:
    """Read the file below a descriptor of sysfs. Raises: OSError."""
    opened = spent_on(lambda: os.open(file, os.O_RDONLY | os.O_CLOEXEC, dir_fd=at))
    try:
        return os.read(opened, _PAGE).decode(errors="replace")
    finally:
        os.close(opened)


def link(at: int, path: str) -> str:
    """Return where the link leads. It takes no descriptor. Raises: OSError."""
    return os.readlink(path, dir_fd=at)


def is_there(at: int, path: str) -> bool:
    """Return whether the path exists. It takes no descriptor. Raises: OSError."""
    try:
        os.stat(path, dir_fd=at)
    except OSError as error:
        if error.errno in ABSENT:
            return False
        raise
    return True


def names(at: int, folder: str) -> list[str]:
    """Return the names in the folder. Raises: OSError."""
    return spent_on(lambda: _names(at, folder))


def _names(at: int, folder: str) -> list[str]:
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
    try:
        return os.listdir(opened)  # noqa: PTH208  a descriptor has no path
    finally:
        os.close(opened)
