"""A disk that is to be pulled: held exclusively, without partitions, its cache flushed.

While a descriptor holds the whole disk with O_EXCL, the kernel mounts and maps neither the disk nor
a partition of it (bd_may_claim in block/bdev.c), and reads no table of partitions
(disk_scan_partitions in block/genhd.c). O_EXCL does not notice a partition that is merely open. So
the partitions are removed from the kernel, which it refuses for an open one (bdev_del_partition in
block/partitions/core.c). Nothing is written to the table on the medium.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from caam_hotplug.errors import (
    DeviceLockedError,
    KernelError,
    UnknownError,
    VolumeBusyError,
)
from caam_hotplug.kernel import (
    block_device,
    device_users,
    disk_cache,
    open_files,
    power,
    sysfs,
    sysfs_tree,
)
from caam_hotplug.model import SECTOR_BYTES, Volume, VolumeId

log = logging.getLogger(__name__)

T = TypeVar("T")

_BLKPG: Final = 0x1269
_BLKPG_ADD_PARTITION, _BLKPG_DEL_PARTITION = 1, 2
_ARGUMENT: Final = struct.Struct("@iiiP")
"""struct blkpg_ioctl_arg of linux/blkpg.h."""
_PARTITION: Final = struct.Struct("@qqi64s64s0q")
"""struct blkpg_partition of linux/blkpg.h: start, length, number, and names that are not used."""
_HOLD: Final = os.O_RDONLY | os.O_EXCL | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
"""The close of a descriptor for writing would have udevd read the partitions anew."""
_PATIENCE_S: Final = 1.0
"""How long a passing user, such as a probe of udevd's, may hold the disk or a partition."""
_PAUSE_S: Final = 0.02


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition as the kernel has it; lengths in bytes."""

    name: str
    number: int
    start: int
    length: int


class EmptiedDisk:
    """A disk that was emptied. Synchronization: one thread at a time."""

    def __init__(self, disk: Volume, opened: int, removed: list[Partition]) -> None:
        self.disk = disk
        self._opened = opened
        self._removed = removed

    def power_off(self) -> None:
        """Stop the disk and switch its USB port off, as far as they can be. Raises: KernelError."""
        power.off(self.disk)

    def close(self) -> None:
        """Let others use the disk. Its partitions stay away until its table is read anew."""
        opened, self._opened = self._opened, -1
        if opened >= 0:
            os.close(opened)

    def restore(self) -> list[Volume]:
        """Have the kernel read the partitions again, let others use them, and return them.

        Raises: VolumeBusyError if others hold the disk by now; KernelError. Then it stays emptied.
        """
        opened = self._opened if self._opened >= 0 else _held(self.disk)
        try:
            try:
                block_device.read_partitions(opened)
            except OSError as error:
                if error.errno != errno.EINVAL:  # that says that it reads no tables of this disk
                    node = self.disk.node
                    raise KernelError("read partitions of", node, error.errno or 0) from error
                _put_back(opened, self.disk, self._removed)
        except BaseException:
            if opened != self._opened:
                os.close(opened)
            raise
        self._opened = opened
        found = self._volumes()
        self.close()
        return found

    def _volumes(self) -> list[Volume]:
        """Return the disk's volumes, as long as it is held.

        Once it is not, udevd may have its partitions removed and read again: it looks at a disk
        after each close of a descriptor for writing, as that which stopped it.
        """
        with suppress(UnknownError):  # the kernel reports them all the same
            found = (sysfs.volume_at(each.name, {}, "kernel") for each in _partitions(self.disk))
            return [volume for volume in found if volume is not None]
        return []


def empty(volume: Volume) -> EmptiedDisk:
    """Hold the volume's disk, remove its partitions from the kernel, and flush its cache.

    Raises: VolumeBusyError with the users; DeviceLockedError; WritesLostError; KernelError (ENODEV
    if the disk has gone). Then all partitions are there as before. Blocks for I/O.
    """
    disk = disk_of(volume)
    end = time.monotonic() + _PATIENCE_S
    opened = _held(disk, end)
    removed: list[Partition] = []
    try:
        with _locked(opened, disk, end):
            _remove_partitions(opened, disk, removed, end)
        users = _users_of_whole(disk) and _users_of_whole(disk)  # a passing one has gone by then
        if users:
            raise VolumeBusyError(disk.node, tuple(users))
        disk_cache.flush(opened, disk)
    except BaseException:
        _put_back(opened, disk, removed)
        os.close(opened)
        raise
    return EmptiedDisk(disk, opened, removed)


def disk_of(volume: Volume) -> Volume:
    """Return the volume's disk, even while its partition is missing. Raises: KernelError."""
    wanted = VolumeId(volume.id.diskseq, 0)
    for name in sysfs.block_names():
        if sysfs.present_id(name) == wanted:
            found = sysfs.volume_at(name, {}, "kernel")
            if found is not None and found.id == wanted:
                return found
    raise KernelError("look for the disk of", volume.node, errno.ENODEV, "it has gone")


def has_partitions(disk: Volume) -> bool:
    """Return whether the kernel has a partition of the disk. Raises: UnknownError."""
    return bool(_partitions(disk))


def users(volume: Volume) -> list[str]:
    """Return who uses the volume's disk, or a partition of it, but for mappings of the agent.

    Processes that merely have it open are not looked for. Raises: KernelError.
    """
    return device_users.of_disk(disk_of(volume).name)


def _held(disk: Volume, end: float = 0.0) -> int:
    """Hold the disk, and return its descriptor. Raises: VolumeBusyError; KernelError."""
    try:
        opened = _retried(partial(os.open, disk.node, _HOLD), end)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _in_use(disk) from error
        raise KernelError("hold", disk.node, error.errno or 0) from error
    try:
        block_device.require_diskseq(opened, disk.node, disk.id.diskseq)
    except BaseException:
        os.close(opened)
        raise
    return opened


@contextmanager
def _locked(opened: int, disk: Volume, end: float) -> Iterator[None]:
    """Keep udevd's probes off the partitions in the block: they take this lock, shared.

    Raises: DeviceLockedError. Source: systemd's block device locking.
    """
    try:
        _retried(partial(fcntl.flock, opened, fcntl.LOCK_EX | fcntl.LOCK_NB), end)
    except BlockingIOError as error:
        raise DeviceLockedError(f"hold {disk.node}: a program has locked it") from error
    yield
    fcntl.flock(opened, fcntl.LOCK_UN)


def _remove_partitions(opened: int, disk: Volume, removed: list[Partition], end: float) -> None:
    """Remove all partitions from the kernel; `removed` has those that are. Raises: KernelError."""
    for partition in _partitions(disk):
        try:
            _retried(partial(_change, opened, _BLKPG_DEL_PARTITION, partition), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # somebody else has removed it
                continue
            if error.errno == errno.EBUSY:
                raise _in_use(disk) from error
            node = f"/dev/{partition.name}"
            raise KernelError("remove partition", node, error.errno or 0) from error
        removed.append(partition)


def _put_back(opened: int, disk: Volume, removed: list[Partition]) -> None:
    """Have the partitions again; what cannot be added singly is read from the disk's table.

    The kernel adds none that overlaps another, or is smaller than a block of the disk, as an
    extended one may be. It takes both from a table (blkpg_do_ioctl in block/ioctl.c).
    """
    failed: dict[int, str] = {}
    for partition in removed:
        try:
            _change(opened, _BLKPG_ADD_PARTITION, partition)
        except OSError as error:  # such as somebody has added it, or the disk has gone
            failed[partition.number] = os.strerror(error.errno or 0)
    if not failed:
        return
    end = time.monotonic() + _PATIENCE_S  # udevd may look at those that were added
    try:
        _retried(partial(block_device.read_partitions, opened), end)
    except OSError:  # a partition is in use, or this disk has no tables
        for number, why in failed.items():
            log.warning("%s: partition %d could not be put back: %s", disk.node, number, why)


def _change(opened: int, operation: int, partition: Partition) -> None:
    described = ctypes.create_string_buffer(
        _PARTITION.pack(partition.start, partition.length, partition.number, b"", b""),
        _PARTITION.size,
    )
    at = ctypes.addressof(described)
    fcntl.ioctl(opened, _BLKPG, _ARGUMENT.pack(operation, 0, _PARTITION.size, at))


def _partitions(disk: Volume) -> list[Partition]:
    """Return the disk's partitions. One that goes meanwhile is left out. Raises: UnknownError."""
    names = sysfs_tree.known(disk.name, partial(device_users.partition_names, disk.name)) or []
    found = (sysfs_tree.known(name, partial(_partition, name)) for name in names)
    there = (partition for partition in found if partition is not None)
    return sorted(there, key=lambda partition: partition.number)


def _partition(name: str) -> Partition:
    """Raises: OSError; ValueError."""
    at = sysfs_tree.root()
    number, start, size = (
        int(sysfs_tree.text(at, f"class/block/{name}/{fact}"))
        for fact in ("partition", "start", "size")
    )
    return Partition(name, number, start * SECTOR_BYTES, size * SECTOR_BYTES)


def _users_of_whole(disk: Volume) -> list[str]:
    """Return the users of a disk without partitions whom O_EXCL does not notice.

    Raises: UnknownError.
    """
    openers = open_files.openers({disk.number: disk.node}, of_all=True)
    return [*device_users.of_disk(disk.name, with_ours=True), *map(str, openers)]


def _in_use(disk: Volume) -> VolumeBusyError:
    found = device_users.of_disk(disk.name, with_ours=True)
    nodes = {disk.number: disk.node}
    for partition in _partitions(disk):
        volume = sysfs.volume_at(partition.name, {}, "kernel")
        if volume is not None:
            nodes[volume.number] = volume.node
    found += map(str, open_files.openers(nodes))
    return VolumeBusyError(disk.node, tuple(dict.fromkeys(found)))


def _retried(call: Callable[[], T], end: float) -> T:
    """Call until nothing is in the way of it, at most until the end. Raises: OSError."""
    while True:
        try:
            return call()
        except OSError as error:
            busy = error.errno in {errno.EBUSY, errno.EWOULDBLOCK}
            if not busy or time.monotonic() >= end:
                raise
        time.sleep(_PAUSE_S)
