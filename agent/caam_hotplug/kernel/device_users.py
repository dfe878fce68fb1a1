"""The users of a block device: nothing is unlocked that something else uses."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import (
    DeviceInUseError,
    DeviceLockedError,
    KernelError,
    UnknownError,
    shown,
)
from caam_hotplug.kernel import mountinfo, sysfs, sysfs_tree
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.sysfs_tree import ABSENT
from caam_hotplug.model import DeviceNumber, Volume

_BLOCK: Final = "class/block"
_NO_DEVICE: Final = ABSENT | {errno.ENOTDIR, errno.ELOOP}
"""Error numbers of a path that leads to no device."""
_PROC: Final = Path("/proc")


def require_unused(volume: Volume, opened: int = -1) -> None:
    """Require that nothing else uses the volume: mount, swap, mapping, array, loop device, fsck.

    The kernel is asked first: a file system, a mapping, swap or a running fsck holds its device
    exclusively, and for a whole disk the kernel counts the holders of its partitions as well
    (open(2), O_EXCL; bd_may_claim in block/bdev.c). A loop device does not.

    `opened`: the caller's descriptor of the node, which is opened again by it and not by its name.
    Raises: DeviceInUseError with all users that can be found; KernelError, also if it cannot be
    seen whether there are users.
    """
    node = volume.node if opened < 0 else f"/proc/self/fd/{opened}"
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise KernelError("open", volume.node, error.errno or 0) from error
        busy = True
    else:
        busy = False
    users: list[str] = []
    with reported_as("look who uses", volume.node, UnknownError):
        numbers = {volume.number, *_partitions(volume.name)}
        users += _loops(numbers | _disk_number(volume))
    if busy:
        with suppress(OSError):  # it is refused anyway
            users += [*_mounts(numbers), *_holders(volume.name), *_swaps(numbers)]
            users += list(_processes(numbers, but=opened)) if not users else []
    if busy or users:
        who = "; ".join(users) or "something that is not visible from here holds it exclusively"
        raise DeviceInUseError(f"use {volume.node}: it is in use: {who}")


def of_disk(name: str, *, with_ours: bool = False) -> list[str]:
    """Return the users of the disk and of its partitions, as far as files of the kernel's tell.

    `with_ours`: also mappings of the agent. Raises: UnknownError.
    """
    with reported_as("look who uses", f"/dev/{name}", UnknownError):
        own = _if_there(f"{_BLOCK}/{name}/dev")
        numbers = set() if own is None else {DeviceNumber.from_text(own)}
        numbers |= {*_partitions(name)}
        held = _holders(name, with_ours=with_ours)
        return [*_loops(numbers), *_mounts(numbers), *held, *_swaps(numbers)]


def is_locked(name: str) -> bool:
    """Return whether a program has locked the disk of this name, or of this partition.

    One that has gone, or has no medium in it, is not locked. Raises: UnknownError.
    """
    try:
        require_unlocked(name)
    except DeviceLockedError:
        return True
    except KernelError as error:
        if error.errno not in {*ABSENT, errno.ENOMEDIUM}:
            raise UnknownError(error.operation, error.subject, error.errno or errno.EIO) from error
    return False


def require_unlocked(name: str) -> None:
    """Require that no program has locked the disk, as one that writes its partitions does.

    `name`: the disk's, or that of a partition on it. udevd takes the same lock, shared, and keeps
    an event until it has the lock.
    Raises: DeviceLockedError; KernelError. Source: systemd's block device locking
    (https://systemd.io/BLOCK_DEVICE_LOCKING), flock(2).
    """
    disk = name
    try:
        disk = f"/dev/{sysfs.disk_name(name)}"
        opened = os.open(disk, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
        finally:
            os.close(opened)
    except BlockingIOError as error:
        raise DeviceLockedError(f"use {disk}: a program has locked it") from error
    except OSError as error:
        raise KernelError("lock", disk, error.errno or 0) from error


def _number_of(path: str) -> DeviceNumber | None:
    """Return the number of a block device's node; None for everything else.

    Only paths in /dev are followed: a path of others may lead to a file system that hangs.
    """
    if not path.startswith("/dev/"):
        return None
    try:
        status = Path(path).stat()
    except OSError as error:
        if error.errno in _NO_DEVICE:
            return None
        raise
    if not stat.S_ISBLK(status.st_mode):
        return None
    return DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))


def _text(file: Path) -> str:
    """Read a file of the kernel's. Names in it are others' and may hold any byte."""
    return file.read_text(errors="backslashreplace").strip()


def _partitions(name: str) -> Iterator[DeviceNumber]:
    for partition in partition_names(name):
        number = _if_there(f"{_BLOCK}/{partition}/dev")
        if number is not None:  # else the table of partitions is read anew
            yield DeviceNumber.from_text(number)


def partition_names(name: str) -> list[str]:
    """Return the names of a disk's partitions. Raises: OSError."""
    try:
        inside = sysfs_tree.names(sysfs_tree.root(), f"{_BLOCK}/{name}")
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise
    return [each for each in inside if names.is_partition_of(each, name)]


def _disk_number(volume: Volume) -> set[DeviceNumber]:
    """Return the number of the volume's disk. What has gone has none. Raises: OSError."""
    try:
        text = _if_there(f"{_BLOCK}/{sysfs.disk_name(volume.name)}/dev")
    except OSError as error:
        if error.errno in ABSENT:
            return set()
        raise
    return set() if text is None else {DeviceNumber.from_text(text)}


def _if_there(file: str) -> str | None:
    """Read a file of sysfs; None if it is not there. Raises: OSError if that is not known."""
    try:
        return sysfs_tree.text(sysfs_tree.root(), file)
    except OSError as error:
        if error.errno in ABSENT:
            return None
        raise


def _mounts(numbers: set[DeviceNumber]) -> Iterator[str]:
    for mount in mountinfo.mounts():
        names_it = mount.filesystem in mountinfo.NAMES_ITS_DEVICE
        if mount.number in numbers or (names_it and _number_of(mount.source) in numbers):
            yield f"mounted at {shown(mount.point)}"


def _holders(name: str, *, with_ours: bool = True) -> Iterator[str]:
    for used in (name, *partition_names(name)):
        folder = f"{_BLOCK}/{used}/holders"
        for holder in sysfs_tree.names(sysfs_tree.root(), folder):
            uuid = _if_there(f"{folder}/{holder}/dm/uuid") or ""
            if not with_ours and names.volume_of_dm_uuid(uuid.strip()) is not None:
                continue
            mapping = _if_there(f"{folder}/{holder}/dm/name")
            yield f"{holder if mapping is None else f'mapping {shown(mapping.strip())}'} lies on it"


def _swaps(numbers: set[DeviceNumber]) -> Iterator[str]:
    with suppress(FileNotFoundError):  # a kernel without swap
        for line in _text(_PROC / "swaps").splitlines()[1:]:
            if _number_of(line.split()[0]) in numbers:
                yield "swap space"


def _loops(numbers: set[DeviceNumber]) -> Iterator[str]:
    for name in sysfs.block_names():
        if not name.startswith("loop"):
            continue
        backing = _if_there(f"{_BLOCK}/{name}/loop/backing_file")
        if backing is not None and _number_of(backing.strip()) in numbers:
            yield f"{name} lies on it"


def _processes(numbers: set[DeviceNumber], but: int) -> Iterator[str]:
    """Yield the processes that have it open, as far as this one may see into others.

    `but`: a descriptor of this process that does not count.
    """
    ours = _PROC / str(os.getpid()) / "fd" / str(but)
    for process in _PROC.glob("[0-9]*"):
        try:
            if any(_number_of(file) in numbers for file in _open_files(process, ours)):
                yield f"process {process.name} ({shown(_text(process / 'comm'))}) has it open"
        except OSError:  # it has ended, or this process may not see into it
            continue


def _open_files(process: Path, but: Path) -> Iterator[str]:
    for file in (process / "fd").iterdir():
        if file != but:
            with suppress(FileNotFoundError):  # it was closed meanwhile
                yield str(file.readlink())
