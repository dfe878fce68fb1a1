"""Processes that use a mounted medium, forked from the tests: a spawn is slow in the guest."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from kernel.cartridges import HELLO

CLONE_NEWNS: Final = 0x20000
MS_BIND, MS_REC, MS_PRIVATE, MS_SLAVE = 0x1000, 0x4000, 0x40000, 0x80000
LIBC: Final = ctypes.CDLL(None, use_errno=True)


@contextmanager
def process(hold: Callable[[Path], Iterator[None]], point: Path) -> Iterator[None]:
    """Run `hold` in a process until its first yield, and end the process afterwards.

    Raises: AssertionError if the process has ended before, as after an error.
    """
    ready, started = os.pipe()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for number, _ in enumerate(hold(point)):
                if number == 0:
                    os.write(started, b"r")
        finally:
            os._exit(code)
    os.close(started)
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


def read_on(point: Path) -> Iterator[None]:
    with (point / HELLO).open("rb", buffering=0) as file:
        while True:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(OSError):
                os.pread(file.fileno(), 10, 0)
            yield


def write_on(point: Path) -> Iterator[None]:
    with (point / "growing").open("wb", buffering=0) as file:
        while True:
            with suppress(OSError):
                file.write(b"x" * 4096)
                os.fsync(file)
            yield


def map_it(point: Path) -> Iterator[None]:
    with (point / "mapped").open("w+b") as file:
        file.truncate(mmap.PAGESIZE)
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    memory[:4] = b"once"
    yield
    signal.pause()


def hold_open(point: Path) -> Iterator[None]:
    with (point / HELLO).open("rb"):
        yield
        signal.pause()


def be_inside(point: Path) -> Iterator[None]:
    os.chdir(point)
    yield
    signal.pause()


def pin_in_a_namespace(point: Path) -> Iterator[None]:
    assert point.is_mount()
    assert LIBC.unshare(CLONE_NEWNS) == 0
    assert LIBC.mount(None, b"/", None, MS_REC | MS_PRIVATE, None) == 0
    yield
    signal.pause()


def be_inside_in_a_namespace(point: Path) -> Iterator[None]:
    holding = pin_in_a_namespace(point)
    next(holding)
    yield from be_inside(point)


def bind_elsewhere(point: Path) -> Iterator[None]:
    elsewhere = point.parent.parent / "elsewhere"
    elsewhere.mkdir()
    assert LIBC.mount(os.fsencode(point), os.fsencode(elsewhere), None, MS_BIND, None) == 0
    yield
    signal.pause()


def be_confined_like_a_service(point: Path) -> Iterator[None]:
    """Hold a copy of the mount that follows the host's unmounts, as systemd's services do."""
    assert point.is_mount()
    assert LIBC.unshare(CLONE_NEWNS) == 0
    assert LIBC.mount(None, b"/", None, MS_REC | MS_SLAVE, None) == 0
    yield
    signal.pause()
