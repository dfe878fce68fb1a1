"""The MBR of a disk in use, of which a partition's type is changed and nothing else.

The table is in one block, so that a write changes it as a whole. Source: UEFI 2.10, 5.2.1.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.kernel.table_entry import TableEntry, chosen, refused, was_changed
from caam_hotplug.model import SECTOR_BYTES, Sectors

PROTECTIVE: Final = 0xEE
_SECTOR: Final = 512
_MARK: Final = b"\x55\xaa"
_DISK_AT: Final = 440
_ENTRIES_AT: Final = 446
_ENTRY: Final = struct.Struct("<B3xB3xII")
"""Status, type, first block, number of blocks."""
_TYPE_AT: Final = 4
_PRIMARY: Final = 4
_EXTENDED: Final = (0x05, 0x0F, 0x85)
_DIVIDED: Final = (*_EXTENDED, 0x63, 0x81, 0xA5, 0xA6, 0xA9, 0xB7, 0xBF)
"""Types of partitions in which the kernel finds others: BSD, Minix, UnixWare, Solaris (subtypes in
block/partitions/msdos.c). The old type of Solaris is left out: it is that of Linux's swap."""
_BOOTS: Final = {
    0xEF: "it is an EFI system partition",
    0xEA: "it is a boot partition (XBOOTLDR)",
}
_ACTIVE: Final = 0x80


@dataclass(frozen=True, slots=True)
class Table:
    """An MBR without a GPT."""

    node: str
    block: int
    """Bytes of a logical block."""
    content: bytes
    """The block that has it."""

    kind = "dos"

    @property
    def disk_id(self) -> str:
        """The disk's identifier."""
        (found,) = struct.unpack_from("<I", self.content, _DISK_AT)
        return f"{found:08x}"

    def entry(self, place: Place) -> TableEntry:
        """Return the entry of the kernel's partition. Raises: UnsupportedVolumeError."""
        if place.number > _PRIMARY:
            raise refused(
                self.node,
                f"partition {place.number} is a logical one, whose entry is in a chain of tables; "
                "use one of the first four, or a GPT",
            )
        entries = self._entries()
        if any(
            each.place.number == place.number and int(each.type, 16) in _DIVIDED for each in entries
        ):
            raise refused(
                self.node,
                f"partition {place.number} is an extended one or one of another system, which has "
                "others in it",
            )
        if not place.start:  # the kernel takes such an entry (msdos_partition)
            raise refused(self.node, f"partition {place.number} reaches into the table itself")
        found = chosen(entries, place, self.node)
        if not int(self.disk_id, 16):
            raise refused(
                self.node,
                "the disk has no identifier, so that an interrupted run would not find it again; "
                f"`sfdisk --disk-id {self.node} 0x1234abcd` gives it one",
            )
        return found

    def _entries(self) -> list[TableEntry]:
        unit, found = self.block // SECTOR_BYTES, []
        for number in range(1, _PRIMARY + 1):
            at = _ENTRIES_AT + (number - 1) * _ENTRY.size
            status, kind, first, count = _ENTRY.unpack_from(self.content, at)
            if kind and count:
                place = Place(number, Sectors(first * unit), Sectors(count * unit))
                is_active = "its entry says that the board boots from it"
                boots = _BOOTS.get(kind, is_active if status & _ACTIVE else "")
                uuid = f"{self.disk_id}-{number:02x}"
                found.append(TableEntry(place, f"{kind:#x}", "", uuid, boots))
        return found

    def require_changeable(self, _number: int, _name: str) -> None:
        """Require nothing: a type always has room."""

    def write(self, blocks: Blocks, number: int, kind: str, _name: str) -> None:
        """Give the partition a type. Raises: UnsupportedVolumeError; KernelError. Blocks for I/O.

        The block is read just before and after, as other programs take no lock.
        """
        after = bytearray(self.content)
        after[_ENTRIES_AT + (number - 1) * _ENTRY.size + _TYPE_AT] = int(kind, 16)
        self._require(blocks, self.content)
        blocks.write(0, bytes(after))
        self._require(blocks, bytes(after))

    def _require(self, blocks: Blocks, content: bytes) -> None:
        if blocks.read(0, self.block) != content:
            raise was_changed(self.node)


def kinds(content: bytes) -> list[int]:
    """Return the types of the entries; none without an MBR."""
    if content[_SECTOR - len(_MARK) : _SECTOR] != _MARK:
        return []
    at = range(_ENTRIES_AT, _ENTRIES_AT + _PRIMARY * _ENTRY.size, _ENTRY.size)
    return [_ENTRY.unpack_from(content, each)[1] for each in at]
