"""How far a run has come, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(count: int) -> Iterator[Callable[[str, str], None]]:
    """Provide what to call before each step: on a terminal one line changes, else a line a round.

    `count`: of the steps.
    """
    is_terminal = sys.stderr.isatty()
    done = 0
    last = ""

    def tell(stage: str, what: str) -> None:
        nonlocal done, last
        if is_terminal:
            percent = 100 * done // count
            print(f"\r\033[K{stage}, {percent} %: {what}", end="", file=sys.stderr, flush=True)
        elif stage != last:
            print(stage, file=sys.stderr, flush=True)
        done, last = done + 1, stage

    try:
        yield tell
    finally:
        if is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
