from __future__ import annotations

import pytest

from caam_hotplug.cli.migrate import _Pace
from caam_hotplug.cli.terminal import ProgressLine

MB = 1_000_000


class Terminal:
    """A stream that is a terminal, or is none."""

    def __init__(self, *, is_terminal: bool) -> None:
        self._is_terminal = is_terminal
        self.text = ""

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_a_terminal_shows_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    clock = iter([0.0, 1.0, 100.0]).__next__
    with ProgressLine(terminal := Terminal(is_terminal=True)) as progress:
        pace = _Pace(progress, clock)
        for done in (0, 2 * MB, 100 * MB):
            pace.reached(done, 10_000 * MB)
    assert terminal.text.split("\r\x1b[K") == [
        "",
        "moving: 0 % of 10000 MB ...",
        "moving: 0 % of 10000 MB, 2.0 MB/s, 1 h 23 min left ...",
        "moving: 1 % of 10000 MB, 1.0 MB/s, 2 h 45 min left ...",
        "",
    ]


def test_without_a_terminal_there_is_a_line_for_each_ten_per_cent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter(range(100)).__next__
    with ProgressLine(Terminal(is_terminal=False)) as progress:
        pace = _Pace(progress, clock)
        for done in range(0, 101 * MB, 5 * MB):
            pace.reached(done, 100 * MB)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "moving: 10 % of 100 MB, 5.0 MB/s, 18 s left"
    assert lines[-1] == "moving: 100 % of 100 MB, 5.0 MB/s, 0 s left"
    assert len(lines) == 10


def test_the_pace_does_not_count_the_work_of_an_earlier_run(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter([0.0, 1.0]).__next__
    with ProgressLine(Terminal(is_terminal=False)) as progress:
        pace = _Pace(progress, clock)
        pace.reached(90 * MB, 100 * MB)
        pace.reached(95 * MB, 100 * MB)
    assert capsys.readouterr().err == "moving: 90 % of 100 MB\n"
