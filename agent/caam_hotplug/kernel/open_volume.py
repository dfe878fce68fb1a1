"""A volume's device node, open: what its disk says of it, and whether it still is the same.

While the node is open, the kernel gives the volume's device number to no other device, and neither
moves nor deletes the partition: a disk's table is not read anew, and BLKPG_DEL_PARTITION refuses
(bdev_disk_changed in block/partitions/core.c, blkpg_do_ioctl in block/ioctl.c). Another medium in
the same reader has the same number, and another sequence number, for which the kernel is asked by
this descriptor.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import (
    blkid,
    block_device,
    device_users,
    partition_table,
    sysfs,
    sysfs_tree,
)
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.partial_copy import PartialCopy
from caam_hotplug.model import DeviceNumber, DevType, Sectors, Volume, number

_HEAD_BYTES: Final = 68 << 10
"""Up to the superblock of btrfs, the last of those that begin a device."""
_TAIL_BYTES: Final = 16 << 10
_ARRAY_UNIT: Final = 64 << 10
"""An md header of version 0.90 begins the last whole unit but one (md_p.h, MD_NEW_SIZE_SECTORS)."""
_OF_OTHERS: Final = {"crypto", "raid"}
"""What libblkid calls the use of a header of encryption, of an array, of a volume group."""
_LUKS: Final = b"LUKS"


class OpenVolume:
    """A volume whose node is open. Blocks for I/O."""

    def __init__(self, volume: Volume) -> None:
        """Open the node, and read what the disk says.

        Raises: KernelError, with ENODEV if another medium is there; DeviceLockedError if udev, too,
        waits for a program that has locked the disk.
        """
        if volume.awaits_udev:
            device_users.require_unlocked(volume.name)
        self._file = _opened(volume.node)
        try:
            self._volume = volume
            self._require_number()
            self.require_same()
            self.volume = self._identified(volume)
            """The volume with its labels and identifiers, as they are on the disk."""
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the node. If it was the last one to have it open, that may block."""
        os.close(self._file)

    def require_unused(self) -> None:
        """Raise DeviceInUseError with the users if something else uses the volume."""
        device_users.require_unused(self._volume, self._file)

    def require_same(self) -> None:
        """Require that its medium is the one with its sequence number. Raises: KernelError."""
        block_device.require_diskseq(self._file, self._volume.node, self._volume.id.diskseq)

    def _require_number(self) -> None:
        """Require that it is the device whose number the mapping will have. Raises: KernelError."""
        status = os.fstat(self._file)
        found = DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))
        if not stat.S_ISBLK(status.st_mode) or found != self._volume.number:
            raise block_device.is_another(self._volume.node)

    def _identified(self, volume: Volume) -> Volume:
        block = block_device.logical_block(self._file, volume.node)
        entry = None if volume.devtype is DevType.DISK else _entry_of(volume, block)
        inside = _superblock(self._file, volume, block)
        return replace(
            volume,
            partlabel=None if entry is None else entry.name,
            partuuid=None if entry is None else entry.uuid,
            parttype=None if entry is None else entry.type,
            label=inside.label,
            uuid=inside.uuid,
            header=inside.type if inside.usage in _OF_OTHERS else None,
            identified=True,
        )


def identify(volume: Volume) -> Volume:
    """Return the volume with its labels and identifiers, as they are on the disk.

    Raises: as OpenVolume.
    """
    with closing(OpenVolume(volume)) as opened:
        return opened.volume


def _opened(node: str) -> int:
    """Open a node for reading past the cache. Raises: KernelError."""
    with reported_as("open", node):
        return os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)


@contextmanager
def _disk(volume: Volume) -> Iterator[tuple[int, str]]:
    """Open the partition's disk; yield descriptor and node. Raises: KernelError."""
    with reported_as("find the disk of", volume.node):
        node = f"/dev/{sysfs.disk_name(volume.name)}"
    file = _opened(node)
    try:
        block_device.require_diskseq(file, node, volume.id.diskseq)
        yield file, node
    finally:
        os.close(file)


def _entry_of(volume: Volume, block: int) -> blkid.Entry | None:
    """Read the partition's entry in the disk's table. Raises: KernelError."""
    with reported_as("find the start of", volume.node):
        attribute = f"dev/block/{volume.number}/start"
        start = number(sysfs_tree.text(sysfs_tree.root(), attribute).strip())
    place = partition_table.Place(volume.id.partition, Sectors(start), volume.size)
    with _disk(volume) as (file, node), closing(PartialCopy(file, node, block)) as copy:
        return partition_table.entry_of(copy, place)


def _superblock(file: int, volume: Volume, block: int) -> blkid.Superblock:
    """Read a filesystem or header in the clear. What cannot be read has none.

    A plain dm-crypt volume has neither, so nothing is unlocked that would not be otherwise; but a
    bad block at the end, where arrays have headers, must not make a medium unusable.
    """
    with closing(PartialCopy(file, volume.node, block)) as copy:
        with suppress(KernelError):
            copy.add_head(_HEAD_BYTES)
        with suppress(KernelError):
            copy.add(copy.size - _TAIL_BYTES, _TAIL_BYTES)
            copy.add((copy.size // _ARRAY_UNIT - 1) * _ARRAY_UNIT, block)
        is_disk = volume.devtype is DevType.DISK
        found = blkid.superblock(copy.file, volume.node, is_disk=is_disk)
        begins_as_luks = copy.read(0, len(_LUKS)) == _LUKS
    if found.type == "crypto_LUKS" and not begins_as_luks:
        # A second header, which an earlier use has left: a filesystem under plain dm-crypt has
        # overwritten the first one, and not this.
        return blkid.Superblock()
    return found
