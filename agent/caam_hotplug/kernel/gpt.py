"""The GPT of a whole disk, through libfdisk: where a partition's entry is read and written.

`read` returns the entries, `make` writes a new table, `rename` writes one entry anew.

The disk is handed over as an open descriptor, which belongs to the caller. It is to be open with
O_DSYNC: then what libfdisk writes reaches the medium in the order in which it is written. That is
the entries and the header at the disk's end, then those at its start, then the protective MBR (the
order that UEFI asks for; gpt_write_disklabel in libfdisk/src/gpt.c). So while an entry is renamed,
one of the two copies is whole at every moment, and libfdisk takes that one: what the table says
changes from old to new with one write.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64, c_ulong, c_void_p
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import Function, Library, failed, null, reported_as
from caam_hotplug.model import SECTOR_BYTES, Sectors

_GPT: Final = b"gpt"
_LEAST_BYTES: Final = 3 << 20
_BLKFLSBUF: Final = 0x1261


@dataclass(frozen=True, slots=True)
class Identity:
    """A partition's name, type and UUID, as its entry has them."""

    name: str
    type: UUID
    uuid: UUID


@dataclass(frozen=True, slots=True)
class Entry:
    """One partition in the table."""

    number: int
    """As in the name of its device node, from 1 on."""
    identity: Identity
    start: Sectors
    length: Sectors


def _negative(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Raise for a result below zero: minus an error number, or -1 for any failure."""
    if result < 0:
        raise failed(function, errno.EIO if result == -1 else -result)
    return result


class Fdisk(Library, soname="libfdisk.so.1", package="libfdisk1"):
    """Source: libfdisk.h."""

    fdisk_add_partition = Function(
        c_int, c_void_p, c_void_p, POINTER(c_size_t), failure=_negative
    )  # fmt: skip
    fdisk_assign_device_by_fd = Function(
        c_int, c_void_p, c_int, c_char_p, c_int, failure=_negative
    )  # fmt: skip
    fdisk_create_disklabel = Function(c_int, c_void_p, c_char_p, failure=_negative)
    fdisk_deassign_device = Function(c_int, c_void_p, c_int)
    """Without a sync nothing can fail."""
    fdisk_disable_dialogs = Function(c_int, c_void_p, c_int, failure=_negative)
    fdisk_enable_wipe = Function(c_int, c_void_p, c_int, failure=_negative)
    fdisk_get_first_lba = Function(c_uint64, c_void_p)
    fdisk_get_grain_size = Function(c_ulong, c_void_p)
    fdisk_get_label = Function(c_void_p, c_void_p, c_char_p)
    fdisk_get_last_lba = Function(c_uint64, c_void_p)
    fdisk_get_nsectors = Function(c_uint64, c_void_p)
    fdisk_get_partitions = Function(c_int, c_void_p, POINTER(c_void_p), failure=_negative)
    fdisk_get_sector_size = Function(c_ulong, c_void_p)
    fdisk_has_label = Function(c_int, c_void_p)
    fdisk_label_get_name = Function(c_char_p, c_void_p)
    fdisk_label_parse_parttype = Function(c_void_p, c_void_p, c_char_p, failure=null)
    fdisk_new_context = Function(c_void_p, failure=null)
    fdisk_new_partition = Function(c_void_p, failure=null)
    fdisk_partition_get_name = Function(c_char_p, c_void_p)
    fdisk_partition_get_partno = Function(c_size_t, c_void_p)
    fdisk_partition_get_size = Function(c_uint64, c_void_p)
    fdisk_partition_get_start = Function(c_uint64, c_void_p)
    fdisk_partition_get_type = Function(c_void_p, c_void_p)
    fdisk_partition_get_uuid = Function(c_char_p, c_void_p)
    fdisk_partition_partno_follow_default = Function(c_int, c_void_p, c_int, failure=_negative)
    fdisk_partition_set_name = Function(c_int, c_void_p, c_char_p, failure=_negative)
    fdisk_partition_set_size = Function(c_int, c_void_p, c_uint64, failure=_negative)
    fdisk_partition_set_start = Function(c_int, c_void_p, c_uint64, failure=_negative)
    fdisk_partition_set_type = Function(c_int, c_void_p, c_void_p, failure=_negative)
    fdisk_partition_set_uuid = Function(c_int, c_void_p, c_char_p, failure=_negative)
    fdisk_parttype_get_string = Function(c_char_p, c_void_p)
    fdisk_set_partition = Function(c_int, c_void_p, c_size_t, c_void_p, failure=_negative)
    fdisk_table_get_nents = Function(c_size_t, c_void_p)
    fdisk_table_get_partition = Function(c_void_p, c_void_p, c_size_t)
    fdisk_unref_context = Function(None, c_void_p)
    fdisk_unref_partition = Function(None, c_void_p)
    fdisk_unref_parttype = Function(None, c_void_p)
    fdisk_unref_table = Function(None, c_void_p)
    fdisk_write_disklabel = Function(c_int, c_void_p, failure=_negative)


def require_library() -> None:
    """Raise KernelError if libfdisk is not installed: everything else here needs it."""
    Fdisk.open()


def read(disk: int, node: str) -> tuple[Entry, ...] | None:
    """Read the partitions in the order of their numbers; None if the disk has no GPT.

    A table of which only the copy at the disk's end is whole is read from there. Raises:
    KernelError. Blocks for I/O.
    """
    with _opened(disk, node, read_only=True) as context:
        return tuple(_entries(context)) if _has_gpt(context) else None


def make(disk: int, node: str, identity: Identity) -> Entry:
    """Write a new GPT with one partition that fills the disk; wipe every other signature.

    The partition's ends are on whole MiB, so that encrypted sectors of any size fill it.
    Raises: KernelError. Blocks for I/O. Source: fdisk_enable_wipe, fdisk_write_disklabel.
    """
    with _opened(disk, node, read_only=False) as context:
        with reported_as("prepare partition table of", node):
            Fdisk.fdisk_enable_wipe(context, 1)
            Fdisk.fdisk_create_disklabel(context, _GPT)
        with reported_as("add a partition to", node):
            _add_largest(context, node, identity)
        (made,) = _entries(context)
        with reported_as("write partition table of", node):
            Fdisk.fdisk_write_disklabel(context)
    return made


def _add_largest(context: int, node: str, identity: Identity) -> None:
    """Add a partition over all of the disk. Raises: KernelError; OSError."""
    unit = Fdisk.fdisk_get_sector_size(context)
    size_bytes = Fdisk.fdisk_get_nsectors(context) * unit
    if size_bytes < _LEAST_BYTES:  # for which libfdisk's numbers make no sense
        raise KernelError("make a partition on", node, errno.ENOSPC, "it is too small")
    start = Fdisk.fdisk_get_first_lba(context)
    grain = Fdisk.fdisk_get_grain_size(context) // unit
    length = (Fdisk.fdisk_get_last_lba(context) + 1 - start) // grain * grain
    with _partition(context, identity) as wanted:
        Fdisk.fdisk_partition_partno_follow_default(wanted, 1)
        Fdisk.fdisk_partition_set_start(wanted, start)
        Fdisk.fdisk_partition_set_size(wanted, length)
        Fdisk.fdisk_add_partition(context, wanted, byref(c_size_t()))


def rename(disk: int, node: str, number: int, identity: Identity) -> None:
    """Write the identity into the entry of the disk's partition, in both copies of the table.

    Raises: KernelError, also if there is no such partition. Blocks for I/O.
    """
    operation = f"rename partition {number} of"
    with _opened(disk, node, read_only=False) as context:
        numbers = {entry.number for entry in _entries(context)} if _has_gpt(context) else {}
        if number not in numbers:
            raise KernelError(operation, node, errno.ENXIO, "it has none")
        with reported_as(operation, node), _partition(context, identity) as wanted:
            Fdisk.fdisk_set_partition(context, number - 1, wanted)
        with reported_as("write partition table of", node):
            Fdisk.fdisk_write_disklabel(context)


@contextmanager
def _opened(disk: int, node: str, *, read_only: bool) -> Iterator[int]:
    """Yield libfdisk's context of the disk. Raises: KernelError, also for the block's reads."""
    if not read_only:
        _drop_cached_blocks(disk)
    with reported_as("read partition table of", node):
        context = Fdisk.fdisk_new_context()
        try:
            Fdisk.fdisk_disable_dialogs(context, 1)
            Fdisk.fdisk_assign_device_by_fd(context, disk, node.encode(), int(read_only))
            yield context
        finally:
            Fdisk.fdisk_deassign_device(context, 1)
            Fdisk.fdisk_unref_context(context)


def _drop_cached_blocks(disk: int) -> None:
    """Drop the disk's cached blocks, which else would be written back with the table.

    The cache has whole blocks, mostly of 4096 bytes. The first and last of a table may be those of
    a partition too, to which a mapping over the disk writes below the cache. Source:
    set_init_blocksize in block/bdev.c; BLKFLSBUF in include/uapi/linux/fs.h.
    """
    with suppress(OSError):  # ENOTTY for what is no device
        fcntl.ioctl(disk, _BLKFLSBUF)


def _has_gpt(context: int) -> bool:
    if not Fdisk.fdisk_has_label(context):
        return False
    label = Fdisk.fdisk_get_label(context, None)
    return bool(Fdisk.fdisk_label_get_name(label) == _GPT)


def _entries(context: int) -> Iterator[Entry]:
    table = c_void_p()
    Fdisk.fdisk_get_partitions(context, byref(table))
    try:
        unit = Fdisk.fdisk_get_sector_size(context) // SECTOR_BYTES
        for index in range(Fdisk.fdisk_table_get_nents(table)):
            yield _entry(Fdisk.fdisk_table_get_partition(table, index), unit)
    finally:
        Fdisk.fdisk_unref_table(table)


def _entry(partition: int, unit: int) -> Entry:
    """Read an entry of a table whose sectors have `unit` of the kernel's."""
    kind = Fdisk.fdisk_parttype_get_string(Fdisk.fdisk_partition_get_type(partition))
    return Entry(
        number=Fdisk.fdisk_partition_get_partno(partition) + 1,  # libfdisk counts from 0
        identity=Identity(
            name=(Fdisk.fdisk_partition_get_name(partition) or b"").decode(errors="replace"),
            type=UUID(kind.decode()),
            uuid=UUID(Fdisk.fdisk_partition_get_uuid(partition).decode()),
        ),
        start=Sectors(Fdisk.fdisk_partition_get_start(partition) * unit),
        length=Sectors(Fdisk.fdisk_partition_get_size(partition) * unit),
    )


@contextmanager
def _partition(context: int, identity: Identity) -> Iterator[int]:
    """Yield an entry with the identity, to be added or set. Raises: OSError."""
    label = Fdisk.fdisk_get_label(context, None)
    partition = Fdisk.fdisk_new_partition()
    kind = None
    try:
        kind = Fdisk.fdisk_label_parse_parttype(label, str(identity.type).upper().encode())
        Fdisk.fdisk_partition_set_type(partition, kind)
        Fdisk.fdisk_partition_set_name(partition, identity.name.encode())
        Fdisk.fdisk_partition_set_uuid(partition, str(identity.uuid).upper().encode())
        yield partition
    finally:
        Fdisk.fdisk_unref_parttype(kind)
        Fdisk.fdisk_unref_partition(partition)
