"""The commands' output: progress on a terminal, tables, JSON, and the end by a signal."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

from caam_hotplug.errors import HotplugError

_ENDS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that end a program."""


class ProgressLine:
    """Shows the current step in one line of a terminal, and overwrites it with the next."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.is_shown = stream.isatty()
        """Whether the stream is a terminal."""
        dim = self.is_shown and not os.environ.get("NO_COLOR")
        self._on, self._off = ("\x1b[2m", "\x1b[0m") if dim else ("", "")

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *_error: object) -> None:
        if self.is_shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def show(self, step: str) -> None:
        """Show the step that begins."""
        if self.is_shown:
            self._stream.write(f"\r\x1b[K{self._on}{step} ...{self._off}")
            self._stream.flush()


class _InterruptionError(KeyboardInterrupt):
    """A signal that is to end the program.

    It is no Exception, so that no step catches it, and asyncio lets it through.
    """


@contextmanager
def interruptible(what: str) -> Iterator[None]:
    """Turn signals that end the program into an error, so that mapping and key are removed first.

    A signal that is ignored stays so: SIGHUP under nohup(1), SIGINT in the background of a script.

    Raises: HotplugError when such a signal arrives.
    """

    def interrupted(number: int, _frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise _InterruptionError(signal.Signals(number).name)

    ends = [each for each in _ENDS if signal.getsignal(each) is not signal.SIG_IGN]
    before = {each: signal.signal(each, interrupted) for each in ends}
    try:
        yield
    except _InterruptionError as error:
        raise HotplugError(f"{what}: interrupted by {error}; the same command goes on") from error
    finally:
        for each, action in before.items():
            signal.signal(each, action)


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align the rows' columns. The last column is not padded."""
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last)]
    return [
        "  ".join(
            [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[last]]
        )
        for row in rows
    ]


def print_json(value: object) -> None:
    """Print the value as JSON, for programs."""
    import json  # noqa: PLC0415  only programs ask for it

    print(json.dumps(value, indent=2))


def print_plan(lines: Iterable[str]) -> None:
    """Print the steps of a dry run."""
    for line in lines:
        print(line)
    print("nothing was changed")
