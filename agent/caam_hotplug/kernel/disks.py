"""Whole disks: held while a command changes them, unless they are the system's own."""

from __future__ import annotations

import fcntl
import os
import signal
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import DeviceInUseError, HotplugError, KernelError, shown
from caam_hotplug.kernel import block_device, mountinfo, sysfs
from caam_hotplug.model import SECTOR_BYTES, DeviceNumber, Sectors, Volume

_SYS_BLOCK: Final = Path("/sys/class/block")
_SYS_DEV: Final = Path("/sys/dev/block")
_PATIENCE_S: Final = 30.0
"""How long others, such as a worker of udevd, may hold the disk before it counts as in use."""

_ENDS_BYTES: Final = 128 << 10
"""The header of an array lies up to so far before the end (md_p.h, MD_NEW_SIZE_SECTORS)."""
_PAGE_HEADER_BYTES: Final = 4
_SYSTEMS_OWN: Final = ("/", "/boot", "/boot/efi", "/usr", "/var", "/etc")


def whole_disk(device: str) -> Volume:
    """Return the disk at the node, or at a link's target.

    Raises: HotplugError if it is a partition, a mapping, or no block device with a medium in it.
    """
    node = Path(os.path.realpath(device))  # it accepts links in a circle, which stat() refuses
    try:
        status = node.stat()
    except OSError as error:
        raise HotplugError(f"look at {shown(device)}: {os.strerror(error.errno or 0)}") from error
    if not stat.S_ISBLK(status.st_mode):
        raise HotplugError(f"look at {shown(device)}: it is no block device")
    number = DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))
    folder = (_SYS_DEV / str(number)).resolve()
    if (folder / "partition").exists():
        raise HotplugError(
            f"look at {shown(device)}: it is a partition; name the whole medium, "
            f"/dev/{folder.parent.name}"
        )
    found = sysfs.volume_at(folder.name, {}, "kernel")
    if found is None or (folder / "dm").exists() or (folder / "md").exists():
        raise HotplugError(f"look at {shown(device)}: it is no disk with a medium in it")
    return found


def is_partition(device: str) -> bool:
    """Whether the node, or a link's target, is a partition; False also for what is no device."""
    try:
        status = Path(os.path.realpath(device)).stat()
    except (OSError, ValueError):
        return False
    folder = (_SYS_DEV / str(_number(status.st_rdev))).resolve()
    return stat.S_ISBLK(status.st_mode) and (folder / "partition").exists()


def disk_of(volume: Volume) -> Volume:
    """Return a partition's disk. Raises: HotplugError if it has gone."""
    return whole_disk(f"/dev/{(_SYS_BLOCK / volume.name).resolve().parent.name}")


def logical_block(disk: Volume) -> int:
    """Return the unit of reads and writes, in bytes. Raises: HotplugError if the disk has gone.

    Source: queue/logical_block_size in Documentation/ABI/stable/sysfs-block.
    """
    try:
        return int((_SYS_BLOCK / disk.name / "queue/logical_block_size").read_text())
    except OSError as error:
        raise HotplugError(f"look at {disk.node}: {os.strerror(error.errno or 0)}") from error


def serial(disk: Volume) -> str | None:
    """Return the disk's serial number as far as the kernel has it; None if it has none.

    Also that of a virtio disk, and of a SCSI or an ATA disk, which is in a page of binary form
    (serial_show in drivers/block/virtio_blk.c; vpd_pg80 in drivers/scsi/scsi_sysfs.c).
    """
    found = [] if disk.serial is None else [disk.serial]
    for file, header in (("serial", 0), ("device/vpd_pg80", _PAGE_HEADER_BYTES)):
        with suppress(OSError):
            content = (_SYS_BLOCK / disk.name / file).read_bytes()[header:]
            found.append(content.decode(errors="replace").strip(" \0\n"))
    return next(filter(None, found), None)


class Held:
    """A disk that is locked against others, to be read and then written."""

    def __init__(self, disk: Volume, lock: int) -> None:
        self.disk = disk
        self.reading = lock
        """A descriptor for reading."""
        self._writing = -1

    def writing(self) -> int:
        """Return a descriptor for writing, the same each time; a write is on the medium at once.

        Raises: KernelError; HotplugError if another medium is in the reader.
        """
        if self._writing < 0:
            flags = os.O_RDWR | os.O_DSYNC | os.O_NOFOLLOW | os.O_CLOEXEC
            try:
                self._writing = os.open(self.disk.node, flags)
            except OSError as error:
                raise KernelError("open", self.disk.node, error.errno or 0) from error
        self.require_same(self._writing)
        return self._writing

    def wipe(self, start: Sectors, length: Sectors) -> None:
        """Overwrite both ends of a partition, where an earlier use may have left a header.

        What is made in it, encrypted, need not overwrite that. Raises: KernelError; HotplugError.
        """
        first, size = start * SECTOR_BYTES, length * SECTOR_BYTES
        file, zeros = self.writing(), bytes(min(_ENDS_BYTES, size))
        for position in (first, first + size - len(zeros)):
            try:
                os.pwrite(file, zeros, position)
            except OSError as error:
                raise KernelError("wipe", self.disk.node, error.errno or 0) from error

    def require_same(self, opened: int) -> None:
        """Require that the open device is the disk, with the medium that was found.

        The next disk gets the node's name as soon as this one has gone. Raises: HotplugError.
        """
        number = _number(os.fstat(opened).st_rdev)
        if number != self.disk.number or sysfs.present_id(self.disk.name) != self.disk.id:
            raise HotplugError(
                f"hold {self.disk.node}: its medium was changed meanwhile; nothing was written to "
                "the one that is there now"
            )

    def require_disk(self, disk: Volume) -> None:
        """Require that this is the held disk, for which a plan was made. Raises: HotplugError."""
        if disk != self.disk:
            raise HotplugError(f"hold {self.disk.node}: the plan was made for another disk")

    def close(self) -> None:
        """Release the disk.

        If it was open for writing, the close has udevd lock the disk and read its partitions anew:
        so the lock goes first.
        """
        fcntl.flock(self.reading, fcntl.LOCK_UN)
        os.close(self.reading)
        if self._writing >= 0:
            os.close(self._writing)


@contextmanager
def held(disk: Volume) -> Iterator[Held]:
    """Lock the disk in the block, so that udevd and what listens to it keep off.

    Raises: DeviceInUseError if others hold the disk so; KernelError; HotplugError if another disk
    has its place. Source: "Locking Block Device Access" of systemd.
    """
    try:
        opened = os.open(disk.node, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError("open", disk.node, error.errno or 0) from error
    hold = Held(disk, opened)
    try:
        _lock(opened, disk)
        hold.require_same(opened)
        yield hold
    finally:
        hold.close()


def _lock(opened: int, disk: Volume) -> None:
    def late(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, _PATIENCE_S)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
    except TimeoutError as error:
        raise DeviceInUseError(
            f"hold {disk.node}: another program has locked it for {_PATIENCE_S:g} s, such as "
            "another `provision` or a partitioning tool"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read_partitions(hold: Held) -> None:
    """Have the kernel read the partitions of the disk's table. Raises: KernelError.

    Where udevd runs, it does so once the disk is released: read twice, the partitions would come,
    go and come.
    """
    if names.UDEV_CONTROL.exists():
        return
    try:
        block_device.read_partitions(hold.writing())
    except OSError as error:
        hint = "pull the medium and plug it again"
        raise KernelError("read partitions of", hold.disk.node, error.errno or 0, hint) from error


def diskseqs() -> set[int]:
    """Return the sequence numbers of the present disks."""
    found = (sysfs.present_id(disk.name) for disk in _SYS_BLOCK.iterdir())
    return {which.diskseq for which in found if which is not None}


def require_not_the_systems(disk: Volume, *more: Path) -> None:
    """Raise DeviceInUseError if the system, or one of the given paths, lies on the disk."""
    for path in (*map(Path, _SYSTEMS_OWN), *more):
        if disk.number in _disks_below(path):
            raise DeviceInUseError(
                f"use {disk.node}: it is the system's own disk: {shown(path)} lies on it"
            )


def _disks_below(path: Path) -> set[DeviceNumber]:
    """Return the whole disks beneath the path's filesystem, also below mappings and arrays."""
    numbers: set[DeviceNumber] = set()
    for existing in (path, *path.parents):
        try:
            numbers.add(_number(existing.stat().st_dev))
            break
        except FileNotFoundError:
            continue
    above = [m for m in mountinfo.mounts() if Path(m.point) in {path, *path.parents}]
    for mount in sorted(above, key=lambda mount: len(mount.point))[-1:]:
        if mount.source.startswith("/dev/"):  # btrfs has a number of its own
            with suppress(OSError):
                numbers.add(_number(Path(mount.source).stat().st_rdev))
    return {disk for number in numbers for disk in _beneath(number)}


def _beneath(number: DeviceNumber) -> Iterator[DeviceNumber]:
    folder = (_SYS_DEV / str(number)).resolve()
    if (folder / "partition").exists():
        folder = folder.parent
    try:
        yield DeviceNumber.from_text((folder / "dev").read_text())
    except (OSError, ValueError):
        return  # no block device: tmpfs and the like
    for slave in folder.glob("slaves/*/dev"):
        yield from _beneath(DeviceNumber.from_text(slave.read_text()))


def _number(device: int) -> DeviceNumber:
    return DeviceNumber(os.major(device), os.minor(device))
