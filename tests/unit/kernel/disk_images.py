"""Images of disks with a partition table, byte by byte, as no tool would make some of them."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from uuid import UUID

from caam_hotplug.kernel import table_in_place
from caam_hotplug.kernel.direct_io import Blocks

LINUX: Final = "0fc63daf-8483-4772-8e79-3d69d8477de4"
ESP: Final = "c12a7328-f81f-11d2-ba4b-00a0c93ec93b"
OWN: Final = UUID("11111111-2222-4333-8444-555555555555")
DISK: Final = UUID("5dbf8ac4-2b8c-4a39-9a3e-6f4f4b3c1a11")
SIZE: Final = 4 << 20
HYBRID: Final = struct.pack("<B3sB3sII", 0x80, b"abc", 0x0C, b"def", 2048, 1024)
"""An entry of an MBR beside the one that protects the GPT."""


@dataclass
class Part:
    """A partition of a GPT; places in blocks."""

    name: str
    first: int
    last: int
    kind: str = LINUX
    uuid: UUID = OWN
    attributes: int = 0


SYSTEM: Final = Part("system", 300, 399, uuid=UUID("aaaaaaaa-2222-4333-8444-555555555555"))
RECORDER: Final = Part("recorder", 400, 599)


@dataclass
class Gpt:
    """A GPT as it is to be."""

    parts: dict[int, Part] = field(default_factory=lambda: {1: SYSTEM, 2: RECORDER})
    block: int = 512
    each: int = 128
    count: int = 128
    size: int = SIZE
    disk: UUID = DISK
    end: int | None = None
    """Where the disk of the image's maker ended, in blocks."""

    @property
    def blocks(self) -> int:
        """Of the whole disk."""
        return self.size // self.block

    @property
    def entries_blocks(self) -> int:
        """Blocks that the entries of a copy have."""
        return -(-self.count * self.each // self.block)

    @property
    def copies(self) -> dict[int, int]:
        """First blocks of the entries, by the block of the header."""
        last = (self.end or self.blocks) - 1
        return {1: 2, last: last - self.entries_blocks}

    def entries(self) -> bytes:
        """Return the entries, in bytes that nobody else would choose after them."""
        content = bytearray(self.count * self.each)
        for number, part in self.parts.items():
            at = (number - 1) * self.each
            content[at : at + self.each] = struct.pack(
                "<16s16sQQQ72s",
                UUID(part.kind).bytes_le,
                part.uuid.bytes_le,
                part.first,
                part.last,
                part.attributes,
                part.name.encode("utf-16-le"),
            ).ljust(self.each, b"\xab")
        return bytes(content)

    def image(self) -> bytearray:
        """Return the disk, whose other bytes are noise."""
        made = bytearray(os.urandom(self.size))
        made[:512] = mbr([HYBRID, struct.pack("<B3sB3sII", 0, b"", 0xEE, b"", 1, 0xFFFFFFFF)])
        entries, (first, last) = self.entries(), self.copies
        for at, other in ((first, last), (last, first)):
            header = self._header(at, other, entries)
            made[at * self.block : (at + 1) * self.block] = header.ljust(self.block, b"\0")
            place = self.copies[at] * self.block
            made[place : place + len(entries)] = entries
        return made

    def _header(self, at: int, other: int, entries: bytes) -> bytes:
        first, last = 2 + self.entries_blocks, min(self.copies[max(self.copies)], self.blocks) - 1
        disk, place = self.disk.bytes_le, self.copies[at]
        more = (at, other, first, last, disk, place, self.count, self.each, zlib.crc32(entries))
        plain = struct.pack("<8sIIIIQQQQ16sQIII", b"EFI PART", 0x10000, 92, 0, 0, *more)
        return plain[:16] + struct.pack("<I", zlib.crc32(plain)) + plain[20:]


def mbr(entries: list[bytes], disk: int = 0x1234ABCD) -> bytes:
    """Return an MBR with these entries, and code of a boot loader."""
    code = bytes(range(220)) * 2
    table = b"".join(entries).ljust(64, b"\0")
    return code + struct.pack("<IH", disk, 0) + table + b"\x55\xaa"


@contextmanager
def on_disk(path: Path, image: bytes | bytearray) -> Iterator[Blocks]:
    """Write the image there, and open it."""
    path.write_bytes(image)
    file = os.open(path, os.O_RDWR)
    try:
        yield Blocks(file, str(path))
    finally:
        os.close(file)


def read(blocks: Blocks, block: int = 512, size: int = SIZE) -> table_in_place.Table:
    """Read the table of an image."""
    return table_in_place.read(blocks, "/dev/sda", block, size)
