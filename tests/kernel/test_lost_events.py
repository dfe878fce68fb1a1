"""Whatever events are lost: present media are mounted, and departed media are released."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from caam_hotplug.kernel import udev
from fakes.contract import until
from kernel.agents import Room, mappings, room_of
from kernel.cartridges import Cartridge, cartridges
from kernel.storms import all_present_are_mounted
from kernel.witness import run

STORM: Final = 8
"""Number of media; `make soak` has 64."""
LABELS: Final = [f"cartridge-{number:02}" for number in range(1, STORM + 1)]


@pytest.fixture(scope="module")
def many(udev_rule: None) -> Iterator[list[Cartridge]]:
    with cartridges(LABELS) as made:
        yield made


@pytest.fixture
def room(many: list[Cartridge], nothing_left: None) -> Iterator[Room]:
    with room_of(many) as made:
        yield made


@contextmanager
def udevd_hanging() -> Iterator[None]:
    """Let udevd take events and not act on them."""
    run("udevadm", "control", "--stop-exec-queue")
    try:
        yield
    finally:
        run("udevadm", "control", "--start-exec-queue")


def test_a_medium_is_mounted_and_released_though_udevd_hangs(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 1.0)
    room.agent.start()
    with udevd_hanging():
        room.plug_and_check()
        room.pull_and_check()
    room.plug_and_check()
    with udevd_hanging():
        room.pull_and_check()


def test_media_that_were_plugged_before_the_agent_are_mounted_though_udevd_hangs(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 1.0)
    with udevd_hanging():
        room.medium.plug()
        room.agent.start()
        room.check_served()
        room.pull_and_check()


def test_after_a_storm_with_most_events_lost_all_present_media_are_mounted_and_no_others(
    room: Room, small_sockets: None
) -> None:
    room.agent.start()
    for medium in room.media[::4]:
        room.plug_and_check(medium)
    with room.agent.suspended():
        for medium in room.media[::4]:
            medium.pull()
        for medium in room.media[1:]:
            medium.plug()
        run("udevadm", "settle")
        room.media[2].pull()
        room.media[2].plug()
        room.media[3].pull()
    room.agent.until_said("the kernel dropped events")
    until(lambda: all_present_are_mounted(room))


def test_after_a_storm_with_a_restart_of_udevd_all_present_media_are_mounted_and_no_others(
    room: Room,
) -> None:
    room.agent.start()
    for medium in room.media[: STORM // 2]:
        medium.plug()
    run("systemctl", "restart", "systemd-udevd")
    for medium in room.media[STORM // 2 :]:
        medium.plug()
    run("systemctl", "kill", "-s", "KILL", "systemd-udevd")
    room.media[0].pull()
    until(lambda: all_present_are_mounted(room))
    for medium in room.media[1:]:
        medium.pull()
    until(lambda: all_present_are_mounted(room))


def test_a_stop_in_the_middle_of_a_storm_leaves_nothing(room: Room) -> None:
    room.agent.start()
    for medium in room.media:
        medium.plug()
    room.agent.until_said(": mounted: at ")
    room.agent.stop()
    assert mappings() == []
    assert list(room.mount_root.iterdir()) == []
