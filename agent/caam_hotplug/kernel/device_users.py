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

from caam_hotplug.errors import DeviceInUseError, DeviceLockedError, KernelError, shown
from caam_hotplug.kernel import mountinfo, sysfs
from caam_hotplug.model import DeviceNumber, Volume

_SYS_BLOCK: Final = Path("/sys/class/block")
_PROC: Final = Path("/proc")


def require_unused(volume: Volume, opened: int = -1) -> None:
    """Require that nothing else uses the volume: mount, swap, mapping, array, loop device, fsck.

    The kernel is asked first: a file system, a mapping, swap or a running fsck holds its device
    exclusively, and for a whole disk the kernel counts the holders of its partitions as well
    (open(2), O_EXCL; bd_may_claim in block/bdev.c). A loop device does not.

    `opened`: the caller's descriptor of the node, which is opened again by it and not by its name.
    Raises: DeviceInUseError with all users that can be found; KernelError.
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
    numbers = {volume.number, *_partitions(volume.name)}
    users = [*_loops(numbers)]
    if busy:
        users += [*_mounts(numbers), *_holders(volume.name), *_swaps(numbers)]
        users += list(_processes(numbers, but=opened)) if not users else []
    if busy or users:
        who = "; ".join(users) or "something that is not visible from here holds it exclusively"
        raise DeviceInUseError(f"use {volume.node}: it is in use: {who}")


def is_locked(name: str) -> bool:
    """Return whether a program has locked the disk of this name, or of this partition."""
    try:
        require_unlocked(name)
    except DeviceLockedError:
        return True
    except KernelError:  # such as one that has gone
        pass
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
    except OSError:
        return None
    if not stat.S_ISBLK(status.st_mode):
        return None
    return DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))


def _text(file: Path) -> str:
    """Read a file of the kernel's. Names in it are others' and may hold any byte."""
    return file.read_text(errors="backslashreplace").strip()


def _partitions(name: str) -> Iterator[DeviceNumber]:
    for file in (_SYS_BLOCK / name).glob(f"{name}*/dev"):
        with suppress(OSError):  # the table of partitions is read anew
            yield DeviceNumber.from_text(file.read_text())


def _mounts(numbers: set[DeviceNumber]) -> Iterator[str]:
    for mount in mountinfo.mounts():
        # btrfs gives its mounts a number of their own, and names the device.
        if mount.number in numbers or _number_of(mount.source) in numbers:
            yield f"mounted at {shown(mount.point)}"


def _holders(name: str) -> Iterator[str]:
    folder = _SYS_BLOCK / name
    for holder in [*folder.glob("holders/*"), *folder.glob(f"{name}*/holders/*")]:
        try:
            yield f"mapping {shown(_text(holder / 'dm/name'))} lies on it"
        except OSError:
            yield f"{holder.name} lies on it"


def _swaps(numbers: set[DeviceNumber]) -> Iterator[str]:
    with suppress(FileNotFoundError):  # a kernel without swap
        for line in _text(_PROC / "swaps").splitlines()[1:]:
            if _number_of(line.split()[0]) in numbers:
                yield "swap space"


def _loops(numbers: set[DeviceNumber]) -> Iterator[str]:
    for name in os.listdir(_SYS_BLOCK):  # noqa: PTH208  there may be hundreds of others
        if not name.startswith("loop"):
            continue
        try:
            backing = _text(_SYS_BLOCK / name / "loop/backing_file")
        except OSError:  # it has none, or was detached meanwhile
            continue
        if _number_of(backing) in numbers:
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
