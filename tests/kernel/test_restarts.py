"""An agent is stopped, killed and started again; a kept mount is not interrupted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from fakes.contract import until
from kernel.agents import Room
from kernel.asked import asked
from kernel.cartridges import HELLO
from kernel.holders import process


def write_without_an_error(point: Path) -> Iterator[None]:
    with (point / "log").open("wb", buffering=0) as file:
        while True:
            file.write(b"a line\n")
            os.fsync(file)
            yield


def until_grown(file: Path) -> None:
    before = file.stat().st_size
    until(lambda: file.stat().st_size > before)


def test_ten_restarts_interrupt_no_writer_on_a_kept_medium(room: Room) -> None:
    room.configure('on_stop = "keep"')
    room.agent.start()
    room.plug_and_check()
    log = room.point() / "log"
    with process(write_without_an_error, room.point()):
        for number in range(10):
            if number % 2:
                room.agent.stop()
            else:
                room.agent.kill()
            room.agent.start()
            room.agent.until_said_ever("adopting its mount")  # before it is ready, or after
            room.check_served()
            until_grown(log)
    log.unlink()
    room.pull_and_check()


def test_an_ejected_disk_that_was_stopped_stays_ejected_over_a_crash_and_can_be_unlocked(
    room: Room,
) -> None:
    with asked(room.agent) as agent:
        agent.start()
        room.plug_and_check()
        (volume,) = (each.volume for each in agent.claims(look=False) if each.state == "mounted")
        assert agent.request("eject", volume) == ""
        room.agent.kill()
        agent.start()
        room.agent.until_said(r"cartridge-01.*: ejected: safe to remove")
        assert agent.request("unlock", volume) == ""
        room.check_served()
        room.pull_and_check()


def test_a_medium_changed_while_no_agent_ran_gets_the_mount_point(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    room.agent.kill()
    room.medium.pull()
    room.medium.plug()
    room.agent.start()
    room.check_served()
    assert (room.point() / HELLO).exists()
    room.pull_and_check()


def test_a_kept_medium_is_locked_by_an_agent_whose_rule_says_so(room: Room) -> None:
    room.configure('on_stop = "keep"')
    room.agent.start()
    room.plug_and_check()
    room.agent.stop()
    room.configure('on_stop = "lock"')
    room.agent.start()
    room.agent.until_said_ever("adopting its mount")  # before it is ready, or after
    room.check_served()
    room.agent.stop()
    room.check_released()
