"""A medium's bytes go from one key to another where they are, and a power cut loses none of them.

That is done piece by piece. Before a piece is written under the new key, what the medium has there
is in a journal on the board, with its place and a checksum. After a cut, however the piece was
torn, it is put back as it was and done again. The journal has room for two pieces, so that the
record of one is not overwritten before that of the next is whole. A piece is read back and compared
before the next one is begun.
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
    """Positions and lengths are in bytes; each raises KernelError."""

    def read(self, position: int, length: int) -> bytes: ...
    def write(self, position: int, content: bytes) -> None: ...
    def flush(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Medium:
    """The same bytes three times."""

    raw: Blocks
    """As they are on the medium."""
    old: Blocks
    """Decrypted with the key that they were written with."""
    new: Blocks
    """Decrypted with the key that they are to have."""
    start: int
    """Where it begins on its disk: pieces end where those of the disk do, so that a block of the
    disk's own, which it may tear as a whole, is not of two pieces."""
    length: int


@dataclass(frozen=True, slots=True)
class Record:
    """One piece of the medium, as it was before it was touched."""

    number: int
    position: int
    """All before it is under the new key, on the medium."""
    content: bytes
    """Empty if nothing is touched: at the beginning, and when all is done."""


class Journal:
    """The records of the last two pieces, of which one may be torn."""

    def __init__(self, blocks: Blocks) -> None:
        self._blocks = blocks

    def records(self) -> list[Record]:
        """Those that are whole, one or two, the last one first; one always is, on the board's disk.

        Raises: KernelError; HotplugError if there is none, so that nobody can say how far it is.
        """
        found = [self._in_slot(slot) for slot in (0, 1)]
        whole = [record for record in found if record is not None]
        if not whole:
            raise HotplugError(
                "read the journal: it is damaged, and what of the medium is under which key cannot "
                "be told; look for a backup of the blob directory, and keep the medium as it is"
            )
        return sorted(whole, key=lambda record: -record.number)

    def note(self, record: Record) -> None:
        """The record is on the board's disk, in place of the last but one. Raises: KernelError."""
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
    """The journal of a medium of which nothing is touched yet."""
    return _packed(Record(0, 0, b"")).ljust(JOURNAL_BYTES, b"\0")


def _packed(record: Record) -> bytes:
    head = _RECORD.pack(
        _MAGIC, record.number, record.position, len(record.content), _checksum(record)
    )
    return head.ljust(_HEAD_BYTES, b"\0") + record.content


def _checksum(record: Record) -> bytes:
    placed = struct.pack("<QQQ", record.number, record.position, len(record.content))
    return sha256(placed + record.content).digest()


def reencrypt(medium: Medium, journal: Journal, tell: Callable[[int], None]) -> None:
    """All of the medium is under the new key; an earlier run that was cut is gone on with.

    `tell` is told of each position that is reached, before anything is written there. Raises:
    KernelError, and HotplugError if what was written does not read back, or the medium is not the
    one that the journal is of; the same call goes on then.
    """
    last, *before = journal.records()
    number, position = last.number, last.position
    tell(position)
    _require_as_far(medium, last, *before)
    if last.content:
        medium.raw.write(position, last.content)
        position += _move(medium, position, len(last.content))
    while position < medium.length:
        tell(position)
        rest_of_block = PIECE_BYTES - (medium.start + position) % PIECE_BYTES
        length = min(rest_of_block, medium.length - position)
        number += 1
        journal.note(Record(number, position, medium.raw.read(position, length)))
        position += _move(medium, position, length)
    journal.note(Record(number + 1, medium.length, b""))
    tell(medium.length)


def _move(medium: Medium, position: int, length: int) -> int:
    """The piece, which is in the journal, is under the new key. Returns: its length."""
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
    """Raises: HotplugError if the piece before the last was not touched yet, as on an earlier copy.

    Who went on there would leave that piece under the old key, and all else under the new.
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
