"""The partition table of a whole disk, through libfdisk: read, made anew, an entry of it renamed.

The disk is handed over as an open descriptor, which belongs to the caller. It is to be open with
O_DSYNC: then what libfdisk writes reaches the medium in the order in which it is written. That is
the entries and the header at the disk's end, then those at its start, then the protective MBR (the
order that UEFI asks for; gpt_write_disklabel in libfdisk/src/gpt.c). So while an entry is renamed,
one of the two copies is whole at every moment, and libfdisk takes that one: what the table says
changes from old to new with one write.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import ctypes_lib
from caam_hotplug.model import SECTOR_BYTES, Sectors

_LIBFDISK: Final = "libfdisk.so.1"
_GPT: Final = b"gpt"
_LEAST_BYTES: Final = 3 << 20
_BLKFLSBUF: Final = 0x1261


@dataclass(frozen=True, slots=True)
class Identity:
    """What an entry says of its partition."""

    name: str
    type: UUID
    uuid: UUID


@dataclass(frozen=True, slots=True)
class Entry:
    """One partition, as the table has it."""

    number: int
    """As in the name of its device node, from 1 on."""
    identity: Identity
    start: Sectors
    length: Sectors


class _Library:
    """The functions used, declared when the first table is read."""

    def __init__(self) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes_lib.declare(_LIBFDISK, name, result, arguments)

        pointer, flag, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        sector, size = ctypes.c_uint64, ctypes.c_size_t
        self.new_context = function("fdisk_new_context", pointer)
        self.unref_context = function("fdisk_unref_context", None, pointer)
        self.disable_dialogs = function("fdisk_disable_dialogs", flag, pointer, flag)
        self.assign = function("fdisk_assign_device_by_fd", flag, pointer, flag, text, flag)
        self.deassign = function("fdisk_deassign_device", flag, pointer, flag)
        self.sector_size = function("fdisk_get_sector_size", ctypes.c_ulong, pointer)
        self.has_label = function("fdisk_has_label", flag, pointer)
        self.label = function("fdisk_get_label", pointer, pointer, text)
        self.label_name = function("fdisk_label_get_name", text, pointer)
        self.enable_wipe = function("fdisk_enable_wipe", flag, pointer, flag)
        self.create_label = function("fdisk_create_disklabel", flag, pointer, text)
        self.write = function("fdisk_write_disklabel", flag, pointer)
        self.partitions = function(
            "fdisk_get_partitions", flag, pointer, ctypes.POINTER(ctypes.c_void_p)
        )
        self.unref_table = function("fdisk_unref_table", None, pointer)
        self.table_length = function("fdisk_table_get_nents", size, pointer)
        self.table_entry = function("fdisk_table_get_partition", pointer, pointer, size)
        self.new_partition = function("fdisk_new_partition", pointer)
        self.unref_partition = function("fdisk_unref_partition", None, pointer)
        self.number = function("fdisk_partition_get_partno", size, pointer)
        self.name = function("fdisk_partition_get_name", text, pointer)
        self.uuid = function("fdisk_partition_get_uuid", text, pointer)
        self.type = function("fdisk_partition_get_type", pointer, pointer)
        self.start = function("fdisk_partition_get_start", sector, pointer)
        self.length = function("fdisk_partition_get_size", sector, pointer)
        self.set_name = function("fdisk_partition_set_name", flag, pointer, text)
        self.set_uuid = function("fdisk_partition_set_uuid", flag, pointer, text)
        self.set_type = function("fdisk_partition_set_type", flag, pointer, pointer)
        self.default_number = function("fdisk_partition_partno_follow_default", flag, pointer, flag)
        self.set_start = function("fdisk_partition_set_start", flag, pointer, sector)
        self.set_length = function("fdisk_partition_set_size", flag, pointer, sector)
        self.first = function("fdisk_get_first_lba", sector, pointer)
        self.last = function("fdisk_get_last_lba", sector, pointer)
        self.sectors = function("fdisk_get_nsectors", sector, pointer)
        self.grain = function("fdisk_get_grain_size", ctypes.c_ulong, pointer)
        self.add = function(
            "fdisk_add_partition", flag, pointer, pointer, ctypes.POINTER(ctypes.c_size_t)
        )
        self.set = function("fdisk_set_partition", flag, pointer, size, pointer)
        self.parse_type = function("fdisk_label_parse_parttype", pointer, pointer, text)
        self.type_text = function("fdisk_parttype_get_string", text, pointer)
        self.unref_type = function("fdisk_unref_parttype", None, pointer)


_loaded: list[_Library] = []


def _library() -> _Library:
    if not _loaded:
        try:
            _loaded.append(_Library())
        except OSError as error:
            hint = "libfdisk of util-linux is missing; Debian's package is libfdisk1"
            raise KernelError("open library", _LIBFDISK, errno.ENOENT, hint) from error
    return _loaded[0]


def require_library() -> None:
    """Raises: KernelError if libfdisk is not installed: everything else here needs it."""
    _library()


def read(disk: int, node: str) -> tuple[Entry, ...] | None:
    """The partitions in the order of their numbers; None if the disk has no GPT.

    A table of which only the copy at the disk's end is whole is read from there. Raises:
    KernelError. Blocks for I/O.
    """
    with _opened(disk, node, read_only=True) as context:
        return tuple(_entries(context, node)) if _has_gpt(context) else None


def make(disk: int, node: str, identity: Identity) -> Entry:
    """The disk has a new GPT with one partition that fills it, and no other signature is left.

    The partition's ends are on whole MiB, so that encrypted sectors of any size fill it.
    Raises: KernelError. Blocks for I/O. Source: fdisk_enable_wipe, fdisk_write_disklabel.
    """
    lib = _library()
    with _opened(disk, node, read_only=False) as context:
        _check(lib.enable_wipe(context, 1), "prepare partition table of", node)
        _check(lib.create_label(context, _GPT), "prepare partition table of", node)
        unit = lib.sector_size(context)
        if lib.sectors(context) * unit < _LEAST_BYTES:  # for which libfdisk's numbers make no sense
            raise KernelError("make a partition on", node, errno.ENOSPC, "it is too small")
        start, grain = lib.first(context), lib.grain(context) // unit
        length = (lib.last(context) + 1 - start) // grain * grain
        with _partition(context, identity) as wanted:
            lib.default_number(wanted, 1)
            lib.set_start(wanted, start)
            lib.set_length(wanted, length)
            number = ctypes.c_size_t()
            added = lib.add(context, wanted, ctypes.byref(number))
            _check(added, "add a partition to", node)
        (made,) = _entries(context, node)
        _check(lib.write(context), "write partition table of", node)
    return made


def rename(disk: int, node: str, number: int, identity: Identity) -> None:
    """The disk's partition of this number says this of itself; both copies of the table are whole.

    Raises: KernelError, also if there is no such partition. Blocks for I/O.
    """
    lib = _library()
    with _opened(disk, node, read_only=False) as context:
        numbers = {entry.number for entry in _entries(context, node)} if _has_gpt(context) else {}
        if number not in numbers:
            raise KernelError(f"rename partition {number} of", node, errno.ENXIO, "it has none")
        with _partition(context, identity) as wanted:
            _check(lib.set(context, number - 1, wanted), f"rename partition {number} of", node)
        _check(lib.write(context), "write partition table of", node)


@contextmanager
def _opened(disk: int, node: str, *, read_only: bool) -> Iterator[int]:
    lib = _library()
    if not read_only:
        _forget_cached(disk)
    context = lib.new_context()
    if not context:
        raise KernelError("read partition table of", node, errno.ENOMEM)
    try:
        lib.disable_dialogs(context, 1)
        assigned = lib.assign(context, disk, node.encode(), int(read_only))
        _check(assigned, "read partition table of", node)
        yield context
    finally:
        lib.deassign(context, 1)
        lib.unref_context(context)


def _forget_cached(disk: int) -> None:
    """What the disk's own cache has of it is not written back with the table.

    The cache has whole blocks, mostly of 4096 bytes, and the first and last of a table may be those
    of a partition too, which a mapping over the disk writes to below the cache. Source:
    set_init_blocksize in block/bdev.c; BLKFLSBUF in include/uapi/linux/fs.h.
    """
    with suppress(OSError):  # ENOTTY of what is no device
        fcntl.ioctl(disk, _BLKFLSBUF)


def _check(result: int, operation: str, node: str) -> None:
    """libfdisk returns minus an errno, or minus one."""
    if result < 0:
        raise KernelError(operation, node, -result if result < -1 else errno.EIO)


def _has_gpt(context: int) -> bool:
    lib = _library()
    return bool(lib.has_label(context)) and lib.label_name(lib.label(context, None)) == _GPT


def _entries(context: int, node: str) -> Iterator[Entry]:
    lib = _library()
    table = ctypes.c_void_p()
    _check(lib.partitions(context, ctypes.byref(table)), "read partition table of", node)
    try:
        unit = lib.sector_size(context) // SECTOR_BYTES
        for index in range(lib.table_length(table)):
            found = lib.table_entry(table, index)
            identity = Identity(
                name=(lib.name(found) or b"").decode(errors="replace"),
                type=UUID(lib.type_text(lib.type(found)).decode()),
                uuid=UUID(lib.uuid(found).decode()),
            )
            start, length = lib.start(found) * unit, lib.length(found) * unit
            number = lib.number(found) + 1  # libfdisk counts from 0
            yield Entry(number, identity, Sectors(start), Sectors(length))
    finally:
        lib.unref_table(table)


@contextmanager
def _partition(context: int, identity: Identity) -> Iterator[int]:
    lib = _library()
    partition = lib.new_partition()
    kind = lib.parse_type(lib.label(context, None), str(identity.type).upper().encode())
    try:
        lib.set_type(partition, kind)
        lib.set_name(partition, identity.name.encode())
        lib.set_uuid(partition, str(identity.uuid).upper().encode())
        yield partition
    finally:
        lib.unref_type(kind)
        lib.unref_partition(partition)
