"""The agent is killed, or its medium pulled, after each call that the agent makes to the kernel."""

from __future__ import annotations

import pytest

from kernel.agents import ARRIVAL, Room
from kernel.forked import Stop, kill_self

SURPRISE = ("ioctl", "ioctl", "umount2", "rmdir", "dm remove")
"""Calls after the medium was pulled while nobody used it: the error table, its activation, and the
release. The activation returns when the medium is closed, which may be after the unmount."""
ORDERLY = ("syncfs", "umount2", "syncfs", "rmdir", "dm remove")
"""Calls after the agent was asked to stop."""
ADOPTION = ("dm message",)
"""Calls of an agent that finds everything as a killed agent made it."""


def numbered(calls: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, id=f"{n}-{call.replace(' ', '-')}") for n, call in enumerate(calls, 1)]


def test_the_agents_calls_are_the_calls_that_are_tested_here(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    room.pull_and_check()
    room.agent.until_called(len(ARRIVAL + SURPRISE))
    room.plug_and_check()
    room.agent.stop()
    calls = room.agent.calls
    load = len(ARRIVAL)
    activation = calls.index("ioctl", load + 1)
    assert activation < calls.index("dm remove")
    calls.insert(load + 1, calls.pop(activation))
    assert tuple(calls) == ARRIVAL + SURPRISE + ARRIVAL + ORDERLY


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_an_agent_killed_while_a_medium_arrives_serves_it_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call, kill_self))
    room.medium.plug()
    room.agent.until_killed()
    room.agent.start()
    room.check_served()
    room.pull_and_check()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_the_next_agent_releases_the_leftovers_if_one_is_killed_while_a_medium_arrives_and_leaves(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call, kill_self))
    room.medium.plug()
    room.agent.until_killed()
    room.medium.pull()
    room.agent.start()
    room.wait_until_released()


@pytest.mark.parametrize("call", numbered(SURPRISE))
def test_the_next_agent_releases_the_leftovers_if_one_is_killed_while_a_medium_leaves(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(len(ARRIVAL) + call, kill_self))
    room.plug_and_check()
    room.medium.pull()
    room.agent.until_killed()
    room.agent.start()
    room.wait_until_released()
    room.plug_and_check()
    room.pull_and_check()


@pytest.mark.parametrize("call", numbered(ORDERLY))
def test_an_agent_killed_while_it_stops_serves_the_medium_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(len(ARRIVAL) + call, kill_self))
    room.plug_and_check()
    room.agent.request_stop()
    room.agent.until_killed()
    room.agent.start()
    room.check_served()
    room.pull_and_check()


@pytest.mark.parametrize("call", numbered(ADOPTION))
def test_an_agent_killed_while_it_adopts_a_medium_serves_it_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start()
    room.plug_and_check()
    room.agent.kill()
    room.agent.begin(Stop(call, kill_self))
    room.agent.until_killed()
    room.agent.start()
    room.check_served()
    room.pull_and_check()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_a_medium_pulled_at_every_call_of_its_arrival_leaves_nothing_and_comes_back(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call))
    room.medium.plug()
    room.agent.until_called(call)
    room.medium.pull()
    room.agent.go_on()
    room.wait_until_released()
    room.plug_and_check()
    room.pull_and_check()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_an_agent_that_is_stopped_twice_at_any_call_of_an_arrival_leaves_nothing(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call))
    room.medium.plug()
    room.agent.until_called(call)
    room.agent.request_stop()
    room.agent.until_said("^stopping")
    room.agent.request_stop()
    room.agent.go_on()
    room.agent.until_ended()
    room.check_released()
