"""A partition's entry in the table that is on its disk now.

libblkid is the parser, as for udev. What is here only knows where libblkid will look, so that those
blocks are copied for it. A block that is missing there makes it find no table, and never another.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import blkid
from caam_hotplug.kernel.partial_copy import PartialCopy
from caam_hotplug.model import Sectors

_HEAD_BLOCKS: Final = 34
"""Of 512 bytes, up to the end of a usual GPT. All other tables begin in here as well."""
_MBR_MARK: Final = b"\x55\xaa"
_MBR_ENTRY: Final = struct.Struct("<4xB3xII")
"""Type, first block, number of blocks (UEFI, 5.2.1)."""
_MBR_ENTRIES_AT: Final = 446
_PROTECTIVE: Final = 0xEE
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_MOST_LOGICAL: Final = 256
"""As many as the kernel has names for (DISK_MAX_PARTS); a chain of an attacker's has no end."""
_GPT_MARK: Final = b"EFI PART"
_GPT_ENTRIES: Final = struct.Struct("<72xQII")
"""In the header: first block of the entries, their number, bytes of each (UEFI, 5.3.2)."""
_MOST_ENTRIES_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where the kernel has a partition."""

    number: int
    start: Sectors
    size: Sectors


def entry_of(copy: PartialCopy, place: Place) -> blkid.Entry | None:
    """Return the table's entry for the partition; None if it has none there.

    What cannot be read of one table may be in the other (find_valid_gpt in block/partitions/efi.c).
    Raises: KernelError, also if the disk cannot be read. Blocks for I/O.
    """
    copy.add_head(max(_HEAD_BLOCKS * 512, 2 * copy.block))
    mbr = copy.read(0, 512)
    kinds = [kind for kind, _, _ in _mbr_entries(mbr)]
    with suppress(KernelError):
        if _PROTECTIVE in kinds:
            _add_gpt(copy, 1)
        _add_logical(copy, mbr)
    found = _found(copy, place)
    if found is None and _PROTECTIVE in kinds:  # perhaps only the copy at the end is whole
        _add_gpt(copy, copy.size // copy.block - 1)
        found = _found(copy, place)
    return found


def _found(copy: PartialCopy, place: Place) -> blkid.Entry | None:
    """Choose the entry as libblkid does for udev, by its place and not by its number.

    If the table was changed and the kernel has not read it since, a number may stand for another
    place than the kernel's. A partition that has grown since is still the same.
    Source: blkid_partlist_devno_to_partition in libblkid.
    """
    entries = blkid.entries(copy.file, copy.node, sector_bytes=copy.block)
    here = [entry for entry in entries if entry.start == place.start]
    exact = next((entry for entry in here if entry.size == place.size), None)
    grown = (each for each in here if each.number == place.number and each.size > place.size)
    return exact or next(grown, None)


def _mbr_entries(sector: bytes) -> list[tuple[int, int, int]]:
    if len(sector) < 512 or sector[510:512] != _MBR_MARK:
        return []
    offsets = (_MBR_ENTRIES_AT + n * _MBR_ENTRY.size for n in range(4))
    return [_MBR_ENTRY.unpack_from(sector, at) for at in offsets]


def _add_gpt(copy: PartialCopy, block: int) -> None:
    """Copy a GPT's header and its entries."""
    copy.add(block * copy.block, copy.block)
    header = copy.read(block * copy.block, copy.block)
    if not header.startswith(_GPT_MARK) or len(header) < _GPT_ENTRIES.size:
        return
    first, count, each = _GPT_ENTRIES.unpack_from(header)
    if count * each <= _MOST_ENTRIES_BYTES:
        copy.add(first * copy.block, count * each)


def _add_logical(copy: PartialCopy, mbr: bytes) -> None:
    """Copy the chain of an MBR's logical partitions: each has a sector that leads to the next."""
    extended = next((first for kind, first, _ in _mbr_entries(mbr) if kind in _EXTENDED), None)
    at = extended
    for _ in range(_MOST_LOGICAL):
        if extended is None or at is None:
            return
        copy.add(at * copy.block, 512)
        sector = copy.read(at * copy.block, 512)
        steps = [first for kind, first, _ in _mbr_entries(sector) if kind in _EXTENDED]
        at = extended + steps[0] if steps else None
