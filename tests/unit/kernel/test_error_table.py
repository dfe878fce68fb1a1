"""What is read of a live table, also of one that is too long for the kernel's answer."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from caam_hotplug.kernel import error_table

HEADER, TARGET = error_table._HEADER, error_table._TARGET
ACTIVE, FULL = 1 << 5, 1 << 8
STATUS, LOAD, SUSPEND = 12, 9, 6


@dataclass
class FakeControl:
    """Answers about one live table as the kernel does: retrieve_status in drivers/md/dm-ioctl.c."""

    kinds: list[bytes]
    status: bytes = b""
    """What each target says of itself."""
    calls: list[int] = field(default_factory=list)
    loaded: tuple[object, ...] = ()
    """Start, length and kind of the target of the last table that was loaded."""

    def call(
        self, number: int, uuid: str, content: bytes = b"", *, flags: int = 0, targets: int = 0
    ) -> bytes:
        self.calls.append(number)
        if number == LOAD:
            start, length, _, _, kind = TARGET.unpack_from(content)
            self.loaded = (start, length, kind.rstrip(b"\0"))
        return self._status(len(content)) if number == STATUS else bytes(HEADER.size)

    def _status(self, room: int) -> bytes:
        answer, at, used, flags = bytearray(room), 0, 0, ACTIVE
        for index, kind in enumerate(self.kinds):
            if room - at <= TARGET.size:
                flags |= FULL
                break
            left = room - at - TARGET.size
            text = self.status[: left - 1] + b"\0"
            if len(text) == left:
                flags |= FULL
                break
            used = at + TARGET.size + len(text)
            following = -(-used // 8) * 8
            answer[at : at + TARGET.size] = TARGET.pack(index, 1, 0, following, kind)
            at = following
        count = len(self.kinds)
        size = HEADER.size
        header = HEADER.pack(4, 0, 0, size + used, size, count, 0, flags, 0, 0, 0, b"", b"")
        return header + bytes(answer)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeControl:
    """Kernel with the table of the test's parameter."""
    control: FakeControl = request.param
    monkeypatch.setattr(error_table, "_call", control.call)
    return control


@pytest.mark.parametrize(
    "loaded", [FakeControl([b"linear"] * n) for n in (1, 341, 342, 1000)], indirect=True
)
def test_a_table_of_any_length_is_replaced(loaded: FakeControl) -> None:
    assert not error_table.is_live("x")
    error_table.load("x")
    assert loaded.loaded == (0, min(len(loaded.kinds), 341), b"error")
    assert loaded.calls[-2:] == [LOAD, SUSPEND]


@pytest.mark.parametrize(
    "loaded", [FakeControl([b"linear"] * 3, b"x" * n) for n in (5000, 16000, 16384)], indirect=True
)
def test_a_table_whose_targets_say_much_of_themselves_is_replaced(loaded: FakeControl) -> None:
    assert not error_table.is_live("x")
    error_table.load("x")
    assert loaded.loaded[2] == b"error"


@pytest.mark.parametrize("loaded", [FakeControl([b"error"] * 342)], indirect=True)
def test_a_table_that_is_not_known_as_a_whole_is_no_error_table(loaded: FakeControl) -> None:
    assert not error_table.is_live("x")


@pytest.mark.parametrize("loaded", [FakeControl([b"error"])], indirect=True)
def test_an_error_table_stays(loaded: FakeControl) -> None:
    assert error_table.is_live("x")
    error_table.load("x")
    assert loaded.calls == [STATUS, STATUS]
