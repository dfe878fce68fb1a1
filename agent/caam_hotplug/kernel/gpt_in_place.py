"""The GPT of a disk in use, of which a partition's entry is changed and nothing else.

Each copy of the table is changed with a write of one block, and is whole before and after it. The
checksum of all entries is in the header, which is another block. Were it to change, a power cut
between the two writes would leave a copy that is not whole. Linux reads the copy at the end of the
disk only if it is asked for on the command line (find_valid_gpt in block/partitions/efi.c), so the
board would not start. So the checksum stays: four bytes at the end of the entry's name, after the
zero that ends it, are chosen for that. CRC-32 is linear, so that there is such a choice always.

Sources: UEFI 2.10, 5.3. All numbers are little-endian:

    header 0 "EFI PART", 12 its length, 16 its CRC, 24 its own block, 32 the other's, 40 and 48 the
    first and last usable block, 56 the disk's GUID, 72 first block of the entries, 80 their number,
    84 bytes of each, 88 their CRC
    entry 0 type, 16 GUID, 32 and 40 first and last block, 48 attributes, 56 name (72 bytes)
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass, replace
from typing import Final
from uuid import UUID

from caam_hotplug.errors import shown
from caam_hotplug.kernel import kept_checksum
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.kernel.table_entry import TableEntry, chosen, refused, was_changed
from caam_hotplug.model import SECTOR_BYTES, Sectors

NAME_MAX_LENGTH: Final = 32
"""Longest name that leaves room for the zero at its end and for what is chosen after it, in UTF-16
units."""

_HEADER: Final = struct.Struct("<8sIIIIQQQQ16sQIII")
_ENTRY: Final = struct.Struct("<16s16sQQQ72s")
_MARK: Final = b"EFI PART"
_CRC_AT: Final = 16
_NAME_BYTES: Final = 72
_MOST_ENTRIES_BYTES: Final = 1 << 20
_REQUIRED, _LEGACY_BOOT = 1 << 0, 1 << 2
"""Attributes (UEFI 2.10, table 5.8)."""
_OF_THE_FIRMWARE: Final = {
    "c12a7328-f81f-11d2-ba4b-00a0c93ec93b": "it is an EFI system partition",
    "bc13c2ff-59e6-4262-a352-b275fd6f7172": "it is a boot partition (XBOOTLDR)",
    "21686148-6449-6e6f-744e-656564454649": "it is a BIOS boot partition",
    "9e1a2d38-c612-4316-aa26-8b49521e5a8b": "it is a PReP boot partition",
    "3de21764-95bd-54bd-a5c3-4abe786f38a8": "it has the environment of U-Boot",
}
"""Types (Discoverable Partitions Specification; util-linux, include/pt-gpt-partnames.h)."""


@dataclass(frozen=True, slots=True)
class Copy:
    """One of the two copies of the table."""

    at: int
    """Block of the header."""
    other: int
    entries_at: int
    """First block of the entries."""
    count: int
    each: int
    """Bytes of an entry."""
    usable: tuple[int, int]
    """First and last block that partitions may have."""
    disk: UUID
    entries: bytes

    def agrees_with(self, other: Copy) -> bool:
        """Whether both describe the same disk and each other."""
        mine, others = ((each.count, each.each, each.usable, each.disk) for each in (self, other))
        return mine == others and (self.other, other.other) == (other.at, self.at)

    def without(self, number: int) -> tuple[bytes, bytes]:
        """Return all entries but one."""
        at = (number - 1) * self.each
        return self.entries[:at], self.entries[at + self.each :]


@dataclass(frozen=True, slots=True)
class Table:
    """A GPT whose two copies are whole."""

    node: str
    block: int
    """Bytes of a logical block."""
    blocks_of_disk: int
    first: Copy
    """The copy at the disk's start, by which the disk's users go."""
    second: Copy

    kind = "gpt"

    @property
    def disk_id(self) -> str:
        """The disk's identifier."""
        return str(self.first.disk)

    def entry(self, place: Place) -> TableEntry:
        """Return the entry of the kernel's partition. Raises: UnsupportedVolumeError.

        The copies may differ in this entry alone: a power cut between the two writes leaves that.
        """
        found = chosen(self._entries(), place, self.node)
        if self.first.without(place.number) != self.second.without(place.number):
            raise refused(
                self.node, "its two copies differ in other partitions; mend it first, as with gdisk"
            )
        self._require_apart(place)
        return found

    def _require_apart(self, place: Place) -> None:
        """Check that no partition has a block of the table. Raises: UnsupportedVolumeError.

        A neighbour may have been grown over the second copy of an image, which is not written then.
        """
        for other in (place, *(entry.place for entry in self._entries())):
            begin, end = self._blocks_of(other)
            for copy in (self.first, self.second):
                last = copy.entries_at + -(-copy.count * copy.each // self.block) - 1
                is_outside = begin < copy.usable[0] or end > copy.usable[1]
                is_within = (begin <= last and copy.entries_at <= end) or begin <= copy.at <= end
                if is_within or (is_outside and other == place):
                    raise refused(
                        self.node, f"partition {other.number} reaches into the table itself"
                    )

    def _blocks_of(self, place: Place) -> tuple[int, int]:
        """Return the first and the last block of a partition."""
        unit = self.block // SECTOR_BYTES
        return place.start // unit, (place.start + place.size - 1) // unit

    def _entries(self) -> list[TableEntry]:
        unit, found = self.block // SECTOR_BYTES, []
        for number in range(1, self.first.count + 1):
            raw = _ENTRY.unpack_from(self.first.entries, (number - 1) * self.first.each)
            kind, uuid, first, last, attributes, name = raw
            if any(kind):
                size = Sectors(max(last + 1 - first, 0) * unit)
                place = Place(number, Sectors(first * unit), size)
                entry = TableEntry(
                    place,
                    str(UUID(bytes_le=kind)),
                    _text(name),
                    str(UUID(bytes_le=uuid)),
                    _why_boots(UUID(bytes_le=kind), attributes),
                )
                found.append(entry)
        return found

    def require_changeable(self, number: int, name: str) -> None:
        """Require room for the name, and that no neighbour has it. Raises: UnsupportedVolumeError.

        The kernel's root=PARTLABEL= and fstab take whichever of two partitions comes first.
        """
        self._changed(self.first, number, str(UUID(int=0)), name)
        for each in self._entries():
            if each.name == name and each.place.number != number:
                raise refused(
                    self.node,
                    f"partition {each.place.number} has the label {shown(name)} already; choose "
                    "another",
                )

    def write(self, blocks: Blocks, number: int, kind: str, name: str) -> None:
        """Give the partition a type and a name. Raises: UnsupportedVolumeError; KernelError.

        `blocks`: of the disk; a write is on the medium when it returns. The copy that counts is
        written last, so what the table says changes with that one write. Each copy is read again
        just before: most programs that write tables take no lock. Blocks for I/O.
        """
        after = [
            replace(copy, entries=self._changed(copy, number, kind, name))
            for copy in (self.second, self.first)
        ]
        for before, copy in zip((self.second, self.first), after, strict=True):
            self._require(blocks, before)
            at = (number - 1) * copy.each // self.block * self.block
            content = copy.entries[at : at + self.block]
            position = copy.entries_at * self.block + at
            if len(content) < self.block:  # the last block is not full of entries
                content += blocks.read(position, self.block)[len(content) :]
            blocks.write(position, content)
        for copy in after:
            self._require(blocks, copy)

    def _require(self, blocks: Blocks, copy: Copy) -> None:
        """Require that the disk has the copy. Raises: UnsupportedVolumeError; KernelError."""
        if _copy(blocks, self.node, self.block, self.blocks_of_disk, copy.at) != copy:
            raise was_changed(self.node)

    def _changed(self, copy: Copy, number: int, kind: str, name: str) -> bytes:
        """Return the entries with one changed, under the checksum of the copy."""
        at = (number - 1) * self.first.each
        entries, encoded = bytearray(self.first.entries), name.encode("utf-16-le")
        if len(encoded) > 2 * NAME_MAX_LENGTH:
            raise refused(
                self.node,
                f"the name of partition {number} has more than {NAME_MAX_LENGTH} characters, whose "
                "room is needed to keep the table's checksum; give it a shorter one",
            )
        entries[at : at + 16] = UUID(kind).bytes_le
        entries[at + _ENTRY.size - _NAME_BYTES : at + _ENTRY.size] = encoded.ljust(
            _NAME_BYTES, b"\0"
        )
        kept_checksum.keep(
            entries, at + _ENTRY.size - kept_checksum.CHOSEN_BYTES, binascii.crc32(copy.entries)
        )
        return bytes(entries)


def read(blocks: Blocks, node: str, block: int, size_bytes: int) -> Table:
    """Read both copies of the disk's table.

    The second one is where the first one says: an image that was written to a larger disk has it
    where the image ended. Raises: UnsupportedVolumeError if one is damaged; KernelError. Blocks
    for I/O.
    """
    blocks_of_disk = size_bytes // block
    first = _copy(blocks, node, block, blocks_of_disk, 1)
    second = _copy(blocks, node, block, blocks_of_disk, first.other)
    if not first.agrees_with(second):
        raise refused(
            node,
            f"its copies at block {first.at} and {second.at} are of different tables; mend it "
            "first, as with gdisk",
        )
    return Table(node, block, blocks_of_disk, first, second)


def _copy(blocks: Blocks, node: str, block: int, blocks_of_disk: int, at: int) -> Copy:
    """Read one copy. Raises: UnsupportedVolumeError; KernelError."""
    try:
        return _whole_copy(blocks, block, blocks_of_disk, at)
    except ValueError as error:
        raise refused(
            node,
            f"its copy at block {at} is damaged: {error}; both are needed, so that a power cut "
            "harms neither. Mend it first, as with gdisk",
        ) from error


def _whole_copy(blocks: Blocks, block: int, blocks_of_disk: int, at: int) -> Copy:
    """Raises: ValueError for a copy that is not whole; KernelError."""
    if not 0 < at < blocks_of_disk:
        raise ValueError(f"the disk has {blocks_of_disk} blocks")
    header = blocks.read(at * block, block)
    mark, _, length, crc, _, own, other, first, last, disk, entries_at, count, each, entries_crc = (
        _HEADER.unpack_from(header)
    )
    if mark != _MARK:
        raise ValueError("it does not begin as a GPT does")
    if not _HEADER.size <= length <= block:
        raise ValueError(f"its header has {length} bytes")
    if binascii.crc32(header[:_CRC_AT] + bytes(4) + header[_CRC_AT + 4 : length]) != crc:
        raise ValueError("its header does not have its checksum")
    if own != at:
        raise ValueError(f"its header says that it is at block {own}")
    if each < _ENTRY.size or each & (each - 1) or not 0 < count * each <= _MOST_ENTRIES_BYTES:
        raise ValueError(f"it has {count} entries of {each} bytes")
    whole = -(-count * each // block)
    if entries_at < 2 or entries_at + whole > blocks_of_disk:
        raise ValueError(f"its entries would be at block {entries_at}")
    entries = blocks.read(entries_at * block, whole * block)[: count * each]
    if binascii.crc32(entries) != entries_crc:
        raise ValueError("its entries do not have their checksum")
    return Copy(at, other, entries_at, count, each, (first, last), UUID(bytes_le=disk), entries)


def _text(name: bytes | bytearray) -> str:
    """Return a name up to its end."""
    units = name.decode("utf-16-le", errors="replace")
    return units.partition("\0")[0]


def _why_boots(kind: UUID, attributes: int) -> str:
    if attributes & _REQUIRED:
        return "its entry says that the board needs it"
    if attributes & _LEGACY_BOOT:
        return "its entry says that the board boots from it"
    return _OF_THE_FIRMWARE.get(str(kind), "")
