"""Standard output of the commands, whose errors say that writing it failed."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO


class UnwrittenError(Exception):
    """The output could not be written, as on a full disk. The command itself did not fail."""


class Output(io.TextIOBase):
    """Standard output whose errors say that writing it failed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._errors_named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._errors_named():
            self._stream.flush()

    def close(self) -> None:
        """Leave the stream open: Python flushes it at its end."""

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()

    @contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:
            raise UnwrittenError(f"write the output: {error.strerror}") from error


def discard() -> None:
    """Keep Python from reporting the error once more when it flushes standard output at its end."""
    with suppress(OSError, ValueError):  # the stream of a test has no descriptor
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
