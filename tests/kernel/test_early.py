"""A medium is served as soon as the kernel reports it; udev's later report still counts."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.contract import until
from kernel.agents import Room
from kernel.cartridges import Cartridge
from kernel.test_lost_events import udevd_hanging
from kernel.witness import run

BLKRRPART: Final = 0x125F
WAITS: Final = "await_udev = true\n"
DOES_NOT_WAIT: Final = "await_udev = false\n"


@pytest.fixture
def room(room: Room) -> Room:
    """Room whose agent does not wait for udev, with a medium as it was made."""
    with room.medium.disposable():
        pass  # remove whatever an earlier test has mounted
    rules = room.configuration.read_text()
    room.configuration.write_text(rules.replace(WAITS, DOES_NOT_WAIT))
    return room


@contextmanager
def rule_of_the_board(text: str) -> Iterator[None]:
    """Give udevd this rule, before all others except the agent's."""
    file = Path("/run/udev/rules.d/10-board.rules")
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    run("udevadm", "control", "--reload")
    try:
        yield
    finally:
        file.unlink()
        run("udevadm", "control", "--reload")


def is_untouched(medium: Cartridge) -> bool:
    """Whether the partition's bytes are those it was made with."""
    return Path(medium.partition).read_bytes() == medium.contents


def test_a_medium_is_mounted_and_released_though_udev_does_not_report_it(room: Room) -> None:
    room.agent.start()
    with udevd_hanging():
        room.plug_and_check()
        room.pull_and_check()
        room.plug_and_check()
    run("udevadm", "settle")
    room.check_still_mounted()
    room.pull_and_check()


def test_with_await_udev_a_medium_waits_until_udev_reports_it(room: Room) -> None:
    rules = room.configuration.read_text()
    room.configuration.write_text(rules.replace(DOES_NOT_WAIT, WAITS))
    assert_waits(room)


@pytest.mark.parametrize(
    "match",
    ['serial = "*"', 'path = "*"', 'model = "scsi_debug*"', 'partuuid = "*"'],
)
def test_a_rule_that_matches_a_fact_of_udevs_waits_for_its_report(room: Room, match: str) -> None:
    rules = room.configuration.read_text()
    first = f'[[rule]]\nname = "first"\nmatch.{match}\nmatch.label = "no such"\n\n[[rule]]'
    room.configuration.write_text(rules.replace("[[rule]]", first, 1))
    assert_waits(room)


def assert_waits(room: Room) -> None:
    """Check that the medium is served, and not before udev has reported it."""
    room.agent.start()
    with udevd_hanging():
        room.medium.plug()
        until(lambda: room.medium.is_plugged and Path(room.medium.partition).exists())
        has_heard_of_it(room)
        assert room.leftovers() == []
        assert is_untouched(room.medium)
    room.check_served()
    room.pull_and_check()


def has_heard_of_it(room: Room) -> None:
    """Wait until the agent has read all events so far: its loop takes them before a reload."""
    room.agent.request_reload()
    room.agent.until_said("^reloaded: ")


@pytest.mark.parametrize(
    "rule",
    [
        'SUBSYSTEM=="block", ENV{CAAM_HOTPLUG}="0"\n',
        'SUBSYSTEM=="block", IMPORT{program}="/bin/echo CAAM_HOTPLUG=0"\n',
    ],
)
def test_the_agent_waits_for_udev_if_a_rule_of_the_board_may_opt_a_medium_out(
    room: Room, rule: str
) -> None:
    room.agent.start()
    with rule_of_the_board(rule):
        with udevd_hanging():
            room.medium.plug()
            until(lambda: room.medium.is_plugged and Path(room.medium.partition).exists())
            has_heard_of_it(room)
        room.agent.until_said("CAAM_HOTPLUG is 0")
        run("udevadm", "settle")
        assert not [line for line in room.agent.log_lines if ": unlocking" in line]
        assert is_untouched(room.medium)
        room.medium.pull()
    run("udevadm", "settle")


def test_a_medium_that_udev_opts_out_unexpectedly_is_released_again(room: Room) -> None:
    room.agent.start()
    with ExitStack() as held:
        with udevd_hanging():
            room.plug_and_check()
            rule = 'SUBSYSTEM=="block", ENV{CAAM_HOTPLUG}="0"\n'
            held.enter_context(rule_of_the_board(rule))
        room.agent.until_said("udev reports something else of it than was known")
        room.agent.until_said("CAAM_HOTPLUG is 0")
        room.wait_until_released()
        room.medium.pull()
    run("udevadm", "settle")


def test_a_medium_whose_disk_a_program_has_locked_waits_until_the_lock_is_released(
    room: Room,
) -> None:
    room.agent.start()
    blob = room.blobs / "cartridge-01.bb"
    sealed = blob.read_bytes()
    blob.unlink()
    room.medium.plug()
    room.agent.until_said("cartridge-01.*: waiting: no blob ")
    run("udevadm", "settle")
    disk = os.open(f"/dev/{room.medium.disk.name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(disk, fcntl.LOCK_EX)
        run("partx", "--delete", f"/dev/{room.medium.disk.name}")
        room.agent.until_said("cartridge-01.*: gone")
        blob.write_bytes(sealed)
        fcntl.ioctl(disk, BLKRRPART)
        has_heard_of_it(room)
        assert room.leftovers() == []
        assert is_untouched(room.medium)
    finally:
        os.close(disk)
    room.check_served()
    room.pull_and_check()
