from __future__ import annotations

import errno
import time
from collections.abc import Iterator

import pytest

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import unknown
from caam_hotplug.kernel.unknown import LONGEST_DELAY_S, Unknown
from caam_hotplug.model import Disappeared, Event


class Device:
    """A device that the kernel gives no answer about, for a number of checks."""

    def __init__(self, name: str, unanswered: int) -> None:
        self.name = name
        self.unanswered = unanswered
        self.checks = 0

    def check(self) -> Iterator[Event]:
        self.checks += 1
        if self.checks <= self.unanswered:
            raise UnknownError("look at", self.name, errno.EMFILE)
        yield Disappeared(self.name)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The monotonic time, which passes only when a test lets it."""
    passed = [100.0]
    monkeypatch.setattr(unknown, "time", Time(passed))
    return passed


class Time:
    def __init__(self, passed: list[float]) -> None:
        self.monotonic = lambda: passed[0]
        assert time.monotonic


def test_what_is_known_is_not_asked_again() -> None:
    asked, device = Unknown(), Device("sda1", 0)
    assert asked.check("sda1", "kernel", device.check) == [Disappeared("sda1")]
    assert not asked.times()
    assert asked.again() == []


def test_what_is_not_known_is_asked_again_later_and_later(now: list[float]) -> None:
    asked, device = Unknown(), Device("sda1", 8)
    assert asked.check("sda1", "kernel", device.check) == []
    waits = []
    while (at := min(asked.times(), default=None)) is not None:
        waits.append(at - now[0])
        now[0] = at
        events = asked.again()
    assert events == [Disappeared("sda1")]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, *[LONGEST_DELAY_S] * 3]


def test_nothing_is_asked_before_its_time(now: list[float]) -> None:
    asked, device = Unknown(), Device("sda1", 1)
    asked.check("sda1", "kernel", device.check)
    now[0] += 0.5
    assert asked.again() == []
    assert device.checks == 1


def test_it_is_said_once_and_once_more_when_it_has_ended(
    now: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    asked, device = Unknown(), Device("sda1", 3)
    for _ in range(3):
        asked.check("sda1", "kernel", device.check)
    now[0] += 10
    asked.again()
    first, last = caplog.messages
    assert first.startswith("look at sda1: Too many open files (raise LimitNOFILE=")
    assert last == "look at sda1: the kernel answers again"


def test_a_removal_does_not_replace_what_an_arrival_has_said(now: list[float]) -> None:
    asked, arrival, removal = Unknown(), Device("sda1", 1), Device("sda1", 0)
    asked.check("sda1", "udev", arrival.check)
    asked.check("sda1", "udev", removal.check, replaces=False)
    assert (arrival.checks, removal.checks) == (2, 0)


def test_devices_are_asked_about_one_by_one(now: list[float]) -> None:
    asked, lasting, short = Unknown(), Device("sda1", 9), Device("sdb1", 1)
    asked.check("sda1", "kernel", lasting.check)
    asked.check("sdb1", "udev", short.check)
    now[0] += 1
    assert asked.again() == [Disappeared("sdb1")]
    assert asked.times() == [now[0] + 2]
