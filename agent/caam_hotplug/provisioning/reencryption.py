"""Re-encrypt a medium in place, piece by piece, so that a power cut loses no byte.

Before a piece is written under the new key, the journal on the board has it as it was, with its
position and a checksum. After a power cut, however the piece was torn, it is put back and written
again. The journal has room for two pieces: the record of one is not overwritten before the record
of the next is whole. Each piece is read back and compared before the next one begins.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from typing import Final, Protocol

from caam_hotplug.errors import HotplugError

PIECE_BYTES: Final = 1 << 20
_RECORD: Final = struct.Struct("<8sQQQ32s")
"""Magic, number of the record, position and length of the piece, checksum of it all."""
_MAGIC: Final = b"CAAMMOVE"
_HEAD_BYTES: Final = 4096
_SLOT_BYTES: Final = _HEAD_BYTES + PIECE_BYTES
JOURNAL_BYTES: Final = 2 * _SLOT_BYTES


class Blocks(Protocol):
    """Storage with positions and lengths in bytes. Each method raises KernelError."""

    def read(self, position: int, length: int) -> bytes: ...
    def write(self, position: int, content: bytes) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Medium:
    """Three views of the same bytes."""

    raw: Blocks
    """The bytes on the medium."""
    old: Blocks
    """The bytes decrypted with the old key."""
    new: Blocks
    """The bytes decrypted with the new key."""
    start: int
    """Where the data begins on its disk.

    Pieces end at multiples of the piece size on the disk. A disk may tear one of its own blocks as
    a whole, and such a block then never belongs to two pieces.
    """
    length: int


@dataclass(frozen=True, slots=True)
class Record:
    """One piece of the medium, as it was under the old key."""

    number: int
    position: int
    """Everything before this position is under the new key, on the medium."""
    content: bytes
    """Empty at the beginning and at the end, when no piece is being written."""

    @property
    def is_first(self) -> bool:
        """Whether the medium was not touched yet."""
        return self.position == 0 and not self.content


class Journal:
    """The records of the last two pieces. One of them may be torn."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def records(self) -> list[Record]:
        """Read the one or two records that are whole, the last one first.

        Raises: KernelError; HotplugError if neither is whole, as then the position is unknown.
        """
        found = [self._in_slot(slot) for slot in (0, 1)]
        whole = [record for record in found if record is not None]
        if not whole:
            raise HotplugError(
                "read the journal: it is damaged, and how far the medium has come is unknown; look "
                "for a backup of the blob directory, and keep the medium as it is"
            )
        return sorted(whole, key=lambda record: -record.number)

    def note(self, record: Record) -> None:
        """Write the record in place of the last but one, and sync it. Raises: KernelError."""
        self._blocks.write(record.number % 2 * _SLOT_BYTES, _packed(record))
        self._blocks.flush()

    def _in_slot(self, slot: int) -> Record | None:
        at = slot * _SLOT_BYTES
        head = self._blocks.read(at, _HEAD_BYTES)
        magic, number, position, length, checksum = _RECORD.unpack_from(head)
        if magic != _MAGIC or length > PIECE_BYTES:
            return None
        content = self._blocks.read(at + _HEAD_BYTES, length) if length else b""
        record = Record(number, position, content)
        return record if _checksum(record) == checksum else None


def beginning() -> bytes:
    """Return the journal of a medium before its first piece."""
    return _packed(Record(0, 0, b"")).ljust(JOURNAL_BYTES, b"\0")


def _packed(record: Record) -> bytes:
    head = _RECORD.pack(
        _MAGIC, record.number, record.position, len(record.content), _checksum(record)
    )
    return head.ljust(_HEAD_BYTES, b"\0") + record.content


def _checksum(record: Record) -> bytes:
    placed = struct.pack("<QQQ", record.number, record.position, len(record.content))
    return sha256(placed + record.content).digest()


def reencrypt(medium: Medium, journal: Journal, reached: Callable[[int], None]) -> None:
    """Move all of the medium to the new key. Goes on after an earlier run that was interrupted.

    `reached` is called with each position before anything is written there. Raises: KernelError;
    HotplugError if a piece does not read back, or the medium is not the journal's. The same call
    goes on then.
    """
    last, *before = journal.records()
    number, position = last.number, last.position
    reached(position)
    _require_as_far(medium, last, *before)
    if last.content:
        medium.raw.write(position, last.content)
        position += _move(medium, position, len(last.content))
    while position < medium.length:
        reached(position)
        rest_of_block = PIECE_BYTES - (medium.start + position) % PIECE_BYTES
        length = min(rest_of_block, medium.length - position)
        number += 1
        journal.note(Record(number, position, medium.raw.read(position, length)))
        position += _move(medium, position, length)
    journal.note(Record(number + 1, medium.length, b""))
    reached(medium.length)


def _move(medium: Medium, position: int, length: int) -> int:
    """Write a piece, which the journal has, under the new key. Returns: its length."""
    plain = medium.old.read(position, length)
    medium.new.write(position, plain)
    medium.new.flush()
    if medium.new.read(position, length) != plain:
        raise HotplugError(
            f"write to the medium at byte {medium.start + position}: it does not read back as it "
            "was written; is the medium damaged?"
        )
    return length


def _require_as_far(medium: Medium, last: Record, before: Record | None = None) -> None:
    """Check that the piece before the last is under the new key. Raises: HotplugError if not.

    On an older copy of the medium it is not. Going on there would leave that piece under the old
    key, and all others under the new one.
    """
    if (
        before is not None
        and before.position < last.position
        and medium.raw.read(before.position, len(before.content)) == before.content
    ):
        raise HotplugError(
            "go on with the medium: it is not as far as the journal says; is it a copy that was "
            "made earlier?"
        )
