"""File descriptors in reserve, to release a pulled medium at the limit of open files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")

_KEPT_MOST: Final = 9
_SHARE: Final = 3
"""The most that one call has open at a time, with a path that is walked part by part."""

_kept: list[int] = []
"""A call takes its share out, and fills up afterwards; two threads may do so at a time. There is no
lock, since a call may block on a medium."""


def fill() -> None:
    """Open the reserve, as far as the limit permits it. Early, so that the numbers are low."""
    with suppress(OSError):
        while len(_kept) < _KEPT_MOST:
            _kept.append(os.eventfd(0, os.EFD_CLOEXEC))


def spent_on(call: Callable[[], T]) -> T:
    """Return what the call returns; if it wants for descriptors, make it again with a share."""
    try:
        return call()
    except OSError as error:
        if error.errno != errno.EMFILE or not _kept:
            raise
    with suppress(IndexError):
        for _ in range(_SHARE):
            os.close(_kept.pop())
    try:
        return call()
    finally:
        fill()
