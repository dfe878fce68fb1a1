"""A medium changes its key in place, and the power is cut: anywhere, and as it really is.

What was not flushed is on the medium by chance, sector by sector; a sector that was being written
is neither old nor new.
"""

from __future__ import annotations

import random
from hashlib import blake2b

import pytest

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.provisioning import reencryption
from caam_hotplug.provisioning.reencryption import Journal, Medium, reencrypt

SECTOR = 512
PIECE = 8 * SECTOR
SLOT = 4096 + PIECE
LENGTH = 4 * PIECE + 3 * SECTOR
PLAIN = random.Random(1).randbytes(LENGTH)
ENDS = [end * SECTOR for end in (5, 13, 21, 29, 35)]
"""Of the pieces: the first is shorter, for where the medium begins on its disk."""
START = 3 * SECTOR
CALLS = 1 + 4 * len(ENDS) + 2
"""Of the whole: a refresh, a record and a piece, each with a flush, and the last record."""
WHOLE = CALLS + 2
"""With what puts a piece back."""


class PowerCutError(Exception):
    """Nothing of the program happens any more."""


class Power:
    """How many calls it lasts for."""

    def __init__(self, calls: int, chance: random.Random) -> None:
        self.left = calls
        self.chance = chance

    def use(self) -> None:
        if self.left == 0:
            raise PowerCutError
        self.left -= 1


class Storage:
    """A disk with a cache that forgets."""

    def __init__(self, content: bytes) -> None:
        self.safe = bytearray(content)
        self.cached = bytearray(content)
        self.power = Power(-1, random.Random(0))
        self.unflushed: set[int] = set()
        """Where sectors begin that were written, with whatever content."""

    def read(self, position: int, length: int) -> bytes:
        return bytes(self.cached[position : position + length])

    def write(self, position: int, content: bytes) -> None:
        self.cached[position : position + len(content)] = content
        self.unflushed |= set(range(position, position + len(content), SECTOR))
        self.power.use()

    def flush(self) -> None:
        self.power.use()
        for at in self.unflushed:
            self.safe[at : at + SECTOR] = self.cached[at : at + SECTOR]
        self.unflushed.clear()

    def fail_to_flush(self) -> None:
        """As Linux has it: what could not be synced stays in the cache, and counts as clean."""
        self.unflushed.clear()
        raise KernelError("sync", "it", 5)

    def refresh(self) -> None:
        """What is read next is what is on the disk."""
        self.flush()
        self.cached[:] = self.safe

    def lose_power(self) -> None:
        """Of what was not flushed, each sector is there, is not, or is torn."""
        for at in sorted(self.unflushed):
            sector = slice(at, at + SECTOR)
            match self.power.chance.randrange(3):
                case 0:
                    self.safe[sector] = self.cached[sector]
                case 1:  # also if it was written as it was
                    self.safe[sector] = self.power.chance.randbytes(SECTOR)
        self.unflushed.clear()
        self.cached[:] = self.safe


class Through:
    """The disk through a key: of each sector another pad."""

    def __init__(self, disk: Storage, key: bytes) -> None:
        self.disk = disk
        self.key = key

    def crypt(self, position: int, content: bytes) -> bytes:
        pads = (
            blake2b(at.to_bytes(8, "big"), key=self.key).digest() * (SECTOR // 64)
            for at in range(position, position + len(content), SECTOR)
        )
        pad = int.from_bytes(b"".join(pads), "big")
        return (pad ^ int.from_bytes(content, "big")).to_bytes(len(content), "big")

    def read(self, position: int, length: int) -> bytes:
        return self.crypt(position, self.disk.read(position, length))

    def write(self, position: int, content: bytes) -> None:
        self.disk.write(position, self.crypt(position, content))

    def flush(self) -> None:
        self.disk.flush()


class Board:
    """A medium under its old key, and a board with a journal."""

    def __init__(self) -> None:
        self.disk = Storage(b"")
        self.old, self.new = Through(self.disk, b"old"), Through(self.disk, b"new")
        self.disk = self.old.disk = self.new.disk = Storage(self.old.crypt(0, PLAIN))
        self.journal = Storage(reencryption.beginning())
        self.reached: list[int] = []

    @property
    def medium(self) -> Medium:
        return Medium(self.disk, self.old, self.new, START, LENGTH)

    def run(self, power: Power) -> None:
        """The program runs until it is done or the power is cut."""
        self.disk.power = self.journal.power = power
        try:
            self.journal.refresh()
            reencrypt(self.medium, Journal(self.journal), self.reached.append)
        except PowerCutError:
            self.disk.lose_power()
            self.journal.lose_power()

    def every_sector_opens(self) -> None:
        """With the old key, or the new one; the piece in flight by the journal."""
        last = Journal(self.journal).records()[0]
        position, content = last.position, last.content
        assert self.new.read(0, position) == PLAIN[:position]
        end = position + len(content)
        assert self.old.crypt(position, content) == PLAIN[position:end]
        assert self.old.read(end, LENGTH - end) == PLAIN[end:]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of a few sectors."""
    monkeypatch.setattr(reencryption, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(reencryption, "_SLOT_BYTES", SLOT)
    monkeypatch.setattr(reencryption, "JOURNAL_BYTES", 2 * SLOT)


def test_all_of_a_medium_is_under_the_new_key_and_each_position_was_reported() -> None:
    board = Board()
    board.run(Power(CALLS, random.Random(0)))
    assert board.new.read(0, LENGTH) == PLAIN
    assert board.reached == [0, 0, *ENDS]


def test_what_is_done_is_not_done_again() -> None:
    board = Board()
    board.run(Power(WHOLE, random.Random(0)))
    before = bytes(board.disk.safe)
    board.run(Power(WHOLE, random.Random(0)))
    assert board.disk.safe == before


@pytest.mark.parametrize("calls", range(CALLS))
def test_cut_at_any_call_every_sector_opens_and_a_second_run_completes_the_medium(
    calls: int,
) -> None:
    for seed in range(20):
        board, chance = Board(), random.Random(seed)
        board.run(Power(calls, chance))
        board.every_sector_opens()
        board.run(Power(WHOLE, chance))
        assert board.new.read(0, LENGTH) == PLAIN


@pytest.mark.parametrize("seed", range(300))
def test_cut_again_and_again_it_comes_to_its_end(seed: int) -> None:
    board, chance = Board(), random.Random(seed)
    for _ in range(200):
        board.run(Power(chance.randrange(9), chance))
        board.every_sector_opens()
    board.run(Power(WHOLE, chance))
    assert board.new.read(0, LENGTH) == PLAIN


def test_an_earlier_copy_of_the_medium_is_not_gone_on_with() -> None:
    board, chance = Board(), random.Random(0)
    copy = bytes(board.disk.safe)
    board.run(Power(7, chance))  # up to where the second piece is in the journal
    board.disk.safe[:] = board.disk.cached[:] = copy
    with pytest.raises(HotplugError, match="is it a copy that was made earlier"):
        board.run(Power(WHOLE, chance))
    assert board.disk.safe == copy


def test_a_medium_that_does_not_keep_what_is_written_is_reported_and_whole_after_another_try(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    board = Board()
    with monkeypatch.context() as forgetful:
        forgetful.setattr(board.disk, "write", lambda _position, _content: None)
        with pytest.raises(HotplugError, match="it does not read back as it was written"):
            board.run(Power(WHOLE, random.Random(0)))
    board.every_sector_opens()
    board.run(Power(WHOLE, random.Random(0)))
    assert board.new.read(0, LENGTH) == PLAIN


def test_a_medium_that_fails_is_gone_on_with(monkeypatch: pytest.MonkeyPatch) -> None:
    board = Board()

    with monkeypatch.context() as broken:
        broken.setattr(board.disk, "flush", board.disk.fail_to_flush)
        with pytest.raises(KernelError):
            board.run(Power(WHOLE, random.Random(0)))
    board.disk.lose_power()
    board.run(Power(WHOLE, random.Random(0)))
    assert board.new.read(0, LENGTH) == PLAIN


@pytest.mark.parametrize("fault", ["both", "one of one"])
def test_a_journal_that_is_damaged_is_not_taken_for_one_of_an_untouched_medium(fault: str) -> None:
    board, chance = Board(), random.Random(0)
    board.run(Power(7 if fault == "both" else 0, chance))
    before = bytes(board.disk.safe)
    for slot in (0, SLOT):
        board.journal.safe[slot + 20] ^= 1
    with pytest.raises(HotplugError, match="read the journal: it is damaged"):
        board.run(Power(WHOLE, chance))
    assert board.disk.safe == before


def test_a_record_that_could_not_be_synced_is_not_relied_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for seed in range(40):
        board, chance = Board(), random.Random(seed)
        board.run(Power(5, chance))  # the first piece is done
        board.disk.power = board.journal.power = Power(WHOLE, chance)
        with monkeypatch.context() as broken:
            broken.setattr(board.journal, "flush", board.journal.fail_to_flush)
            with pytest.raises(KernelError):
                reencrypt(board.medium, Journal(board.journal), board.reached.append)
        board.run(Power(chance.randrange(CALLS), chance))
        board.every_sector_opens()
        board.run(Power(WHOLE, chance))
        assert board.new.read(0, LENGTH) == PLAIN


def test_an_earlier_copy_is_noticed_after_a_run_that_was_cut_again() -> None:
    board, chance = Board(), random.Random(0)
    copy = bytes(board.disk.safe)
    board.run(Power(7, chance))
    board.run(Power(3, chance))  # the second piece is put back
    board.disk.safe[:] = board.disk.cached[:] = copy
    with pytest.raises(HotplugError, match="is it a copy that was made earlier"):
        board.run(Power(WHOLE, chance))
    assert board.disk.safe == copy
