"""The contents of a device, through libblkid: a filesystem, a header, an entry in a table."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import (
    Function,
    Library,
    failed,
    minus_one,
    null,
    reported_as,
)
from caam_hotplug.model import Sectors

_BLKID_FLTR_ONLYIN: Final = 2
_FOUND: Final = 0
_AMBIVALENT: Final = -2
"""Of blkid_do_safeprobe, beside 1 for nothing."""
_BLKID_SUBLKS_LABEL: Final = 1 << 1
_BLKID_SUBLKS_UUID: Final = 1 << 3
_BLKID_SUBLKS_TYPE: Final = 1 << 5
_BLKID_SUBLKS_USAGE: Final = 1 << 7
_SUPERBLOCK_FLAGS: Final = (
    _BLKID_SUBLKS_TYPE | _BLKID_SUBLKS_USAGE | _BLKID_SUBLKS_LABEL | _BLKID_SUBLKS_UUID
)
_BLKID_FLTR_NOTIN: Final = 1
_OF_WHOLE_DISKS: Final = (
    "adaptec_raid_member", "ddf_raid_member", "hpt37x_raid_member", "hpt45x_raid_member",
    "isw_raid_member", "jmicron_raid_member", "lsi_mega_raid_member", "nvidia_raid_member",
    "promise_fasttrack_raid_member", "silicon_medley_raid_member", "via_raid_member",
)  # fmt: skip
"""Headers of array controllers. libblkid looks for them on whole disks, and in files."""
_PIECE: Final = 512
_LARGEST_SECTOR: Final = 4096
"""Of dm-crypt."""


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry in a partition table; None for what it does not have."""

    number: int
    start: Sectors
    size: Sectors
    name: str | None
    uuid: str | None
    type: str | None


@dataclass(frozen=True, slots=True)
class Superblock:
    """A filesystem, or a header such as LUKS; None for what is not there."""

    type: str | None = None
    usage: str | None = None
    """`filesystem`, `raid`, `crypto` or `other` (libblkid's manual)."""
    label: str | None = None
    uuid: str | None = None


def _probe_failed(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Raise for a result below zero: minus an error number, or -1 with errno.

    A device that cannot be read must not pass for an empty one.
    """
    if result < 0 and result != _AMBIVALENT:
        raise failed(function, ctypes.get_errno() if result == -1 else -result)
    return result


class Blkid(Library, soname="libblkid.so.1", package="libblkid1"):
    """Source: blkid.h."""

    blkid_do_safeprobe = Function(c_int, c_void_p, failure=_probe_failed)
    blkid_partition_get_name = Function(c_char_p, c_void_p)
    blkid_partition_get_partno = Function(c_int, c_void_p)
    blkid_partition_get_size = Function(c_int64, c_void_p)
    blkid_partition_get_start = Function(c_int64, c_void_p)
    blkid_partition_get_type = Function(c_int, c_void_p)
    blkid_partition_get_type_string = Function(c_char_p, c_void_p)
    blkid_partition_get_uuid = Function(c_char_p, c_void_p)
    blkid_partlist_get_partition = Function(c_void_p, c_void_p, c_int)
    blkid_partlist_numof_partitions = Function(c_int, c_void_p)
    blkid_free_probe = Function(None, c_void_p)
    blkid_new_probe = Function(c_void_p, failure=null)
    blkid_probe_enable_partitions = Function(c_int, c_void_p, c_int, failure=minus_one)
    blkid_probe_enable_superblocks = Function(c_int, c_void_p, c_int, failure=minus_one)
    blkid_probe_filter_superblocks_type = Function(
        c_int, c_void_p, c_int, POINTER(c_char_p), failure=minus_one
    )
    blkid_probe_get_partitions = Function(c_void_p, c_void_p)
    """Null without a table. It belongs to the probe, and is free with it."""
    blkid_probe_lookup_value = Function(
        c_int, c_void_p, c_char_p, POINTER(c_char_p), POINTER(c_size_t)
    )
    """-1 if there is no such value: the pointer is as it was."""
    blkid_probe_set_device = Function(c_int, c_void_p, c_int, c_int64, c_int64, failure=minus_one)
    blkid_probe_set_sectorsize = Function(c_int, c_void_p, c_uint, failure=minus_one)
    blkid_probe_set_superblocks_flags = Function(c_int, c_void_p, c_int, failure=minus_one)


def probe(node: str, allowed: Sequence[str]) -> str | None:
    """Return the type of the filesystem on the device if it is one of those allowed, else None.

    Only the allowed types' own detectors see the bytes. Raises: KernelError if the device
    cannot be read. Blocks for I/O. Source: blkid_do_safeprobe in libblkid.
    """
    with _probing(node) as pr:
        wanted = (c_char_p * (len(allowed) + 1))(*(name.encode() for name in allowed), None)
        Blkid.blkid_probe_enable_superblocks(pr, 1)
        Blkid.blkid_probe_set_superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        Blkid.blkid_probe_filter_superblocks_type(pr, _BLKID_FLTR_ONLYIN, wanted)
        found = _value(pr, "TYPE") if Blkid.blkid_do_safeprobe(pr) == _FOUND else None
    return None if found == "vfat" and not _has_fat(node) else found


def _has_fat(node: str) -> bool:
    """Return whether the file allocation tables of a vfat are plausible.

    If sector_size is not that of the medium, the first 512 bytes of each larger sector are still
    decrypted correctly. The rest is noise (with CBC, the first 16 bytes of each 512). On a small
    vfat the kernel checks no more than libblkid does, and would mount that. Every table begins with
    a media descriptor filled up with ones, and an end mark. Two tables differ only by what a pull
    between their writes has left. If all sectors differ that the wrong size would garble, they are
    noise. A single table that begins well is accepted.
    Source: Microsoft's FAT specification (fatgen103), BPB, FAT[0] and FAT[1].
    """
    try:
        with Path(node).open("rb", buffering=0) as device:
            boot = device.read(_PIECE)
            sector, reserved, count, short = struct.unpack_from("<H x H B 5x H", boot, 11)
            (long,) = struct.unpack_from("<I", boot, 36)
            first, length = sector * reserved, (short or long) * sector
            tables = []
            for at in (first, first + length)[:count]:
                device.seek(at)
                tables.append((at, device.read(min(length, _LARGEST_SECTOR))))
    except (OSError, struct.error) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise KernelError("read", node, number or errno.EIO) from error
    if not tables or not _begins_as_fat(tables[0][1]):
        return False
    garbled = [
        [table[start : start + _PIECE] for _, table in tables]
        for start in range(0, min(len(table) for _, table in tables), _PIECE)
        if all((at + start) % _LARGEST_SECTOR for at, _ in tables)
    ]
    return len(garbled) < 2 or any(len(set(pieces)) == 1 for pieces in garbled)


def _begins_as_fat(table: bytes) -> bool:
    """Return whether FAT[0] and FAT[1] are valid, of 12, 16 or 32 bits, but for the last bits."""
    return len(table) > 2 and table[0] & table[2] & 0xF0 == 0xF0 and table[1] & 0x0F == 0x0F


def known_contents(node: str) -> str | None:
    """Describe what lies on the device, or return None if libblkid recognises nothing.

    All of libblkid's detectors see the bytes. Raises: KernelError. Blocks for I/O.
    """
    with _probing(node) as pr:
        Blkid.blkid_probe_enable_superblocks(pr, 1)
        Blkid.blkid_probe_set_superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        Blkid.blkid_probe_enable_partitions(pr, 1)
        if Blkid.blkid_do_safeprobe(pr) == _AMBIVALENT:
            return "signatures of more than one kind"
        what, table = _value(pr, "TYPE"), _value(pr, "PTTYPE")
        if what is not None:
            return f"{what} (a filesystem, or a header)"
        return None if table is None else f"a partition table ({table})"


def entries(file: int, node: str, *, sector_bytes: int) -> list[Entry]:
    """Read the partition table that an open file has; without one there are no entries.

    `node` is for messages. Raises: KernelError.
    """
    with _probing_file(file, node) as pr:
        Blkid.blkid_probe_set_sectorsize(pr, sector_bytes)
        Blkid.blkid_probe_enable_superblocks(pr, 0)
        Blkid.blkid_probe_enable_partitions(pr, 1)
        table = Blkid.blkid_probe_get_partitions(pr)
        if table is None:
            return []
        count = Blkid.blkid_partlist_numof_partitions(table)
        return [_entry(Blkid.blkid_partlist_get_partition(table, n)) for n in range(count)]


def _entry(partition: int) -> Entry:
    kind = Blkid.blkid_partition_get_type_string(partition)
    return Entry(
        number=Blkid.blkid_partition_get_partno(partition),
        start=Sectors(Blkid.blkid_partition_get_start(partition)),
        size=Sectors(Blkid.blkid_partition_get_size(partition)),
        name=_text(Blkid.blkid_partition_get_name(partition)),
        uuid=_text(Blkid.blkid_partition_get_uuid(partition)),
        # As udev reports it (blkid_partitions_probe_partition in libblkid).
        type=_text(kind) or f"{Blkid.blkid_partition_get_type(partition):#x}",
    )


def superblock(file: int, node: str, *, is_disk: bool) -> Superblock:
    """Read the filesystem or header that an open file has in the clear.

    `node` is for messages. Raises: KernelError.
    """
    with _probing_file(file, node) as pr:
        Blkid.blkid_probe_enable_superblocks(pr, 1)
        Blkid.blkid_probe_set_superblocks_flags(pr, _SUPERBLOCK_FLAGS)
        if not is_disk:
            left_out = (name.encode() for name in _OF_WHOLE_DISKS)
            unwanted = (c_char_p * (len(_OF_WHOLE_DISKS) + 1))(*left_out, None)
            Blkid.blkid_probe_filter_superblocks_type(pr, _BLKID_FLTR_NOTIN, unwanted)
        if Blkid.blkid_do_safeprobe(pr) != _FOUND:
            return Superblock()
        found = (_value(pr, name) for name in ("TYPE", "USAGE", "LABEL", "UUID"))
        return Superblock(*found)


@contextmanager
def _probing(node: str) -> Iterator[int]:
    """Yield a probe of the device. Raises: KernelError, also for the block's failed calls."""
    with reported_as("open", node):
        file = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with _probing_file(file, node) as pr:
            yield pr
    finally:
        os.close(file)


@contextmanager
def _probing_file(file: int, node: str) -> Iterator[int]:
    """Yield a probe of an open file. Raises: KernelError, also for the block's failed calls."""
    with reported_as("probe", node):
        pr = Blkid.blkid_new_probe()
        try:
            Blkid.blkid_probe_set_device(pr, file, 0, 0)
            yield pr
        finally:
            Blkid.blkid_free_probe(pr)


def _value(pr: int, name: str) -> str | None:
    value, length = c_char_p(), c_size_t()
    Blkid.blkid_probe_lookup_value(pr, name.encode(), byref(value), byref(length))
    return _text(value.value)


def _text(value: bytes | None) -> str | None:
    return None if value is None else value.decode(errors="replace")
