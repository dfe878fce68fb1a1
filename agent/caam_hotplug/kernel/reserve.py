"""File descriptors in reserve, to release a pulled medium at the limit of open files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")

KEPT_MOST: Final = 9
_SHARE: Final = 3
"""The most that one call has open at a time, with a path that is walked part by part."""


class Reserve:
    """Descriptors that are kept open. Any thread.

    A call takes its share out, and fills up afterwards; two threads may do so at a time. There is
    no lock, since a call may block on a medium.
    """

    def __init__(self) -> None:
        self.kept: list[int] = []
        self._is_spent = False
        """Whether it is to be filled as soon as a call succeeds."""

    def fill(self) -> None:
        """Open the reserve, as far as the limit permits it. Early, so that the numbers are low."""
        try:
            while len(self.kept) < KEPT_MOST:
                self.kept.append(os.eventfd(0, os.EFD_CLOEXEC))
            self._is_spent = False
        except OSError:
            self._is_spent = True

    def spent_on(self, call: Callable[[], T]) -> T:
        """Return what the call returns; if it wants for descriptors, make it again with a share."""
        try:
            result = call()
        except OSError as error:
            if error.errno != errno.EMFILE or not self.kept:
                raise
        else:
            if self._is_spent:
                self.fill()
            return result
        with suppress(IndexError):
            for _ in range(_SHARE):
                os.close(self.kept.pop())
        try:
            return call()
        finally:
            self.fill()


RESERVE: Final = Reserve()
"""That of this process, empty until it is filled."""
spent_on = RESERVE.spent_on
