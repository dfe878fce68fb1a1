"""Killed after every call that an agent makes to the kernel, or its medium pulled there."""

from __future__ import annotations

import pytest

from kernel.agents import ARRIVAL, Room
from kernel.forked import Stop, kill_self

SURPRISE = ("umount2", "rmdir", "dm remove")
"""Those after it was pulled, when nobody uses it."""
ORDERLY = ("syncfs", "umount2", "rmdir", "dm remove")
"""Those after the agent was told to stop."""
ADOPTION = ("dm message",)
"""Those of an agent that finds everything made by one that was killed."""


def numbered(calls: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, id=f"{n}-{call.replace(' ', '-')}") for n, call in enumerate(calls, 1)]


def test_the_calls_are_those_that_are_tested_here(room: Room) -> None:
    room.agent.start()
    room.arrives()
    room.leaves()
    room.agent.until_called(len(ARRIVAL + SURPRISE))
    room.arrives()
    room.agent.stop()
    assert tuple(room.agent.calls) == ARRIVAL + SURPRISE + ARRIVAL + ORDERLY


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_an_agent_killed_while_a_medium_arrives_serves_it_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call, kill_self))
    room.medium.plug()
    room.agent.until_killed()
    room.agent.start()
    room.is_served()
    room.leaves()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_an_agent_killed_while_a_medium_arrives_and_leaves_is_swept_after(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call, kill_self))
    room.medium.plug()
    room.agent.until_killed()
    room.medium.pull()
    room.agent.start()
    room.has_nothing()


@pytest.mark.parametrize("call", numbered(SURPRISE))
def test_an_agent_killed_while_a_medium_leaves_is_swept_after(room: Room, call: int) -> None:
    room.agent.start(Stop(len(ARRIVAL) + call, kill_self))
    room.arrives()
    room.medium.pull()
    room.agent.until_killed()
    room.agent.start()
    room.has_nothing()
    room.arrives()
    room.leaves()


@pytest.mark.parametrize("call", numbered(ORDERLY))
def test_an_agent_killed_while_it_stops_serves_the_medium_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(len(ARRIVAL) + call, kill_self))
    room.arrives()
    room.agent.tell_to_stop()
    room.agent.until_killed()
    room.agent.start()
    room.is_served()
    room.leaves()


@pytest.mark.parametrize("call", numbered(ADOPTION))
def test_an_agent_killed_while_it_adopts_a_medium_serves_it_after_its_next_start(
    room: Room, call: int
) -> None:
    room.agent.start()
    room.arrives()
    room.agent.kill()
    room.agent.begin(Stop(call, kill_self))
    room.agent.until_killed()
    room.agent.start()
    room.is_served()
    room.leaves()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_a_medium_pulled_at_every_call_of_its_arrival_leaves_nothing_and_comes_back(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call))
    room.medium.plug()
    room.agent.until_called(call)
    room.medium.pull()
    room.agent.go_on()
    room.has_nothing()
    room.arrives()
    room.leaves()


@pytest.mark.parametrize("call", numbered(ARRIVAL))
def test_an_agent_told_twice_to_stop_at_every_call_of_an_arrival_leaves_nothing(
    room: Room, call: int
) -> None:
    room.agent.start(Stop(call))
    room.medium.plug()
    room.agent.until_called(call)
    room.agent.tell_to_stop()
    room.agent.until_said("^stopping")
    room.agent.tell_to_stop()
    room.agent.go_on()
    room.agent.until_ended()
    room.has_nothing_already()
