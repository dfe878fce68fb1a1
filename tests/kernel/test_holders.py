"""Pulled while others use the medium: its key dies at once, and it mounts again beside the remains.

The holders are processes of their own, forked, since a spawn is slow in the guest.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from fakes.contract import until
from kernel.agents import Room, mappings, tables
from kernel.cartridges import HELLO
from kernel.holders import process

CLONE_NEWNS: Final = 0x20000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
LIBC: Final = ctypes.CDLL(None, use_errno=True)


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


@pytest.mark.parametrize(
    "hold",
    [read_on, write_on, map_it, hold_open, be_inside, be_inside_in_a_namespace, bind_elsewhere],
    ids=lambda hold: hold.__name__.replace("_", "-"),
)
def test_a_medium_pulled_while_in_use_loses_its_key_at_once_and_mounts_again(
    room: Room, hold: Callable[[Path], Iterator[None]]
) -> None:
    room.agent.start()
    room.arrives()
    with process(hold, room.point()):
        room.medium.pull()
        room.agent.until_said("removed-unsafely")
        assert [line for line in tables() if " error" not in line] == []
        assert len(mappings()) == 1
        room.medium.plug()
        room.is_served()
    until(lambda: len(mappings()) == 1)
    room.leaves()


def test_a_mount_that_another_namespace_has_as_well_is_gone_with_its_mount_point(
    room: Room,
) -> None:
    # Removing a directory detaches what is mounted on it in any namespace (detach_mounts in
    # fs/namespace.c).
    room.agent.start()
    room.arrives()
    with process(pin_in_a_namespace, room.point()):
        room.leaves()
        room.arrives()
    room.leaves()


@pytest.mark.parametrize("hold", [hold_open, be_inside])
def test_a_medium_in_use_when_the_agent_stops_is_detached_and_its_data_are_on_it(
    room: Room, hold: Callable[[Path], Iterator[None]]
) -> None:
    room.agent.start()
    room.arrives()
    (room.point() / "written").write_bytes(b"last")
    with process(hold, room.point()):
        room.agent.stop()
        assert not room.point().exists()
    until(lambda: mappings() == [])
    room.agent.start()
    room.agent.until_said("mounted: at")
    assert (room.point() / "written").read_bytes() == b"last"
    (room.point() / "written").unlink()
