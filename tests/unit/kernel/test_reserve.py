from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from caam_hotplug.kernel import mountinfo, reserve, sysfs_tree
from caam_hotplug.kernel.reserve import KEPT_MOST, RESERVE


@pytest.fixture(autouse=True)
def filled() -> Iterator[None]:
    RESERVE.fill()
    yield
    while RESERVE.kept:
        os.close(RESERVE.kept.pop())


@contextmanager
def no_descriptor_left() -> Iterator[None]:
    """Take all descriptors up to the limit, which is low meanwhile."""
    sysfs_tree.root()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(map(int, os.listdir("/proc/self/fd"))), hard))
    taken = []
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open("/", os.O_PATH))
        yield
    finally:
        for one in taken:
            os.close(one)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_what_a_release_needs_can_be_read_at_the_limit_of_open_files() -> None:
    at = sysfs_tree.root()
    with no_descriptor_left():
        with pytest.raises(OSError, match="Too many open files"):
            os.open("/", os.O_PATH)
        for _ in range(20):
            assert mountinfo.mounts()
            assert sysfs_tree.names(at, "class/block")
    assert len(RESERVE.kept) == KEPT_MOST


def test_a_call_that_wants_for_more_than_there_is_fails_and_the_reserve_stays() -> None:
    def greedy() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        reserve.spent_on(greedy)
    assert len(RESERVE.kept) == KEPT_MOST


def test_a_reserve_that_was_spent_is_filled_once_that_is_possible(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def greedy(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(reserve.os, "eventfd", greedy)
        for _ in range(4):
            with pytest.raises(OSError, match="Too many open files"):
                reserve.spent_on(greedy)
    assert RESERVE.kept == []
    assert reserve.spent_on(lambda: 1) == 1
    assert len(RESERVE.kept) == KEPT_MOST


def test_other_errors_spend_nothing() -> None:
    calls = []

    def fails() -> None:
        calls.append(1)
        raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        reserve.spent_on(fails)
    assert calls == [1]
