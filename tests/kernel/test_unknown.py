"""What the kernel does not say is not taken for a no: nothing present is released for that."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import pytest

from caam_hotplug.kernel import sysfs
from fakes.contract import until
from kernel.agents import Room, mappings, tables
from kernel.cartridges import Cartridge
from kernel.witness import run

ENOUGH: Final = 1024
NONE: Final = 0
"""A limit at which no descriptor can be opened, whatever the process closes."""


def opened(room: Room) -> set[int]:
    """Return the agent's descriptors."""
    return set(map(int, os.listdir(f"/proc/{room.agent.pid}/fd")))


@contextmanager
def no_more_files(room: Room, most: int = NONE) -> Iterator[None]:
    """Let the agent open no more files meanwhile."""
    _, hard = resource.prlimit(room.agent.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(room.agent.pid, resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.prlimit(room.agent.pid, resource.RLIMIT_NOFILE, (ENOUGH, hard))


@contextmanager
def covered(point: str) -> Iterator[None]:
    """Mount an empty filesystem over the directory, in the agent's namespace and everybody's."""
    run("mount", "-t", "tmpfs", "none", point)
    try:
        yield
    finally:
        run("umount", point)


class Reports:
    """The files of a medium with which the kernel is made to report it, open beforehand."""

    def __init__(self, medium: Cartridge) -> None:
        folders = (medium.disk, medium.disk / f"{medium.disk.name}1")
        self._files = [os.open(folder / "uevent", os.O_WRONLY) for folder in folders]

    def change(self) -> None:
        """Have the kernel report disk and partition as changed."""
        for file in self._files:
            os.pwrite(file, b"change", 0)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            os.close(file)


@pytest.fixture
def reports(room: Room) -> Iterator[Reports]:
    """The reports of the room's medium, which is mounted."""
    room.agent.start()
    room.plug_and_check()
    run("udevadm", "settle")
    made = Reports(room.medium)
    yield made
    made.close()


def check_untouched(room: Room) -> None:
    """Check that the medium is mounted and was never released."""
    room.check_still_mounted()
    assert [line.split()[2] for line in tables(room.medium.label)] == ["crypt"]
    log = room.agent.everything()
    for word in ("gone", "detaching", "removed-unsafely", "pulled"):
        assert f"{room.medium.label}" not in "".join(
            line for line in log.splitlines() if f": {word}" in line
        ), log


def refused(*_: object) -> int:
    """Fail as at the limit of open files."""
    raise OSError(errno.EMFILE, "Too many open files")


def until_taken(room: Room) -> None:
    """Wait until the agent has taken the events so far: its loop has gone round."""
    run("udevadm", "settle", "--timeout=10")
    room.agent.until_pinged(3)


def test_a_change_that_cannot_be_looked_at_releases_nothing(room: Room, reports: Reports) -> None:
    with no_more_files(room):
        reports.change()
        room.agent.until_said(r"look at sd.*Too many open files \(raise LimitNOFILE=")
        until_taken(room)
        check_untouched(room)
    room.agent.until_said("the kernel answers again")
    check_untouched(room)
    room.plug_and_check(room.neighbour)
    room.pull_and_check()


def test_a_medium_that_is_pulled_at_the_limit_of_open_files_is_released(
    room: Room, reports: Reports
) -> None:
    room.plug_and_check(room.neighbour)
    with no_more_files(room, len(opened(room))):
        reports.change()
        room.neighbour.pull()
        until(lambda: not tables(room.neighbour.label) and not room.point(room.neighbour).exists())
        check_untouched(room)
    room.plug_and_check(room.neighbour)
    room.pull_and_check()


def test_a_medium_that_is_pulled_while_no_file_can_be_opened_loses_its_key_and_later_its_mount(
    room: Room, reports: Reports
) -> None:
    room.plug_and_check(room.neighbour)
    with no_more_files(room):
        reports.change()
        room.neighbour.pull()
        until(lambda: [t.split()[2] for t in tables(room.neighbour.label)] in ([], ["error"]))
        check_untouched(room)
    room.agent.until_said_ever("the kernel answers again")
    until(lambda: not room.point(room.neighbour).exists())
    check_untouched(room)
    room.plug_and_check(room.neighbour)
    room.pull_and_check()


def test_a_medium_that_is_plugged_while_no_file_can_be_opened_is_served_afterwards(
    room: Room, reports: Reports
) -> None:
    with no_more_files(room):
        room.neighbour.plug()
        room.neighbour.settle()
        until_taken(room)
        check_untouched(room)
    room.check_served(room.neighbour)
    room.pull_and_check()


def test_events_that_are_lost_while_no_file_can_be_opened_release_nothing(
    room: Room, small_sockets: None, reports: Reports
) -> None:
    with no_more_files(room):
        with room.agent.suspended():
            for _ in range(100):
                reports.change()
            run("udevadm", "settle")
        room.agent.until_said("the kernel dropped events")
        until_taken(room)
        check_untouched(room)
    room.agent.until_said("the kernel answers again")
    check_untouched(room)
    room.plug_and_check(room.neighbour)
    room.pull_and_check()


def test_an_agent_that_cannot_look_at_media_adopts_none_and_takes_none_for_gone(
    room: Room, reports: Reports, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.agent.kill()
    with monkeypatch.context() as patch:
        patch.setattr(sysfs, "_number", refused)
        room.agent.begin()
        room.agent.until_said("UnknownError: look at .*: Too many open files")
        room.agent.until_ended(1)
        check_untouched(room)
    room.agent.start()
    room.check_served()
    room.pull_and_check()


@pytest.mark.parametrize("point", ["/sys", "/sys/class"])
def test_a_cover_over_sysfs_releases_nothing_and_hides_no_removal(
    room: Room, reports: Reports, point: str
) -> None:
    delete = os.open(room.medium.disk / "device/delete", os.O_WRONLY)
    try:
        with covered(point):
            reports.change()
            room.agent.until_pinged(3)
            check_untouched(room)
            os.write(delete, b"1")
            until(lambda: mappings() == [])
    finally:
        os.close(delete)
    room.wait_until_released()
    room.plug_and_check()
    room.pull_and_check()
