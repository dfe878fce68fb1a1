"""Processes that use a mounted medium, forked from the tests: a spawn is slow in the guest."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def process(hold: Callable[[Path], Iterator[None]], point: Path) -> Iterator[None]:
    """A process in which `hold` has come to its first yield and goes on; it ends on the way out.

    Raises: AssertionError if it has ended before, as with an error.
    """
    ready, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number, _ in enumerate(hold(point)):
                if number == 0:
                    os.write(tell, b"r")
        finally:
            os._exit(code)
    os.close(tell)
    ended = False
    try:
        assert os.read(ready, 1) == b"r", "the process has ended before it was ready"
        yield
        ended = os.waitpid(pid, os.WNOHANG) != (0, 0)
        assert not ended, "the process has ended"
    finally:
        if not ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        os.close(ready)
        subprocess.run(["umount", point.parent.parent / "elsewhere"], capture_output=True)
