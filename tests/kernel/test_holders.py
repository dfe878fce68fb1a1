"""Pulled while in use: its key dies at once, and the medium mounts again beside the remains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes.contract import until
from kernel.agents import Room, mappings, tables
from kernel.holders import (
    be_inside,
    be_inside_in_a_namespace,
    bind_elsewhere,
    hold_open,
    map_it,
    pin_in_a_namespace,
    process,
    read_on,
    write_on,
)


@pytest.mark.parametrize(
    "hold",
    [read_on, write_on, map_it, hold_open, be_inside, be_inside_in_a_namespace, bind_elsewhere],
    ids=lambda hold: hold.__name__.replace("_", "-"),
)
def test_a_medium_pulled_while_in_use_loses_its_key_at_once_and_mounts_again(
    room: Room, hold: Callable[[Path], Iterator[None]]
) -> None:
    room.agent.start()
    room.plug_and_check()
    with process(hold, room.point()):
        room.medium.pull()
        room.agent.until_said("removed-unsafely")
        assert [line for line in tables() if " error" not in line] == []
        assert len(mappings()) == 1
        room.medium.plug()
        room.check_served()
    until(lambda: len(mappings()) == 1)
    room.pull_and_check()


def test_a_mount_that_another_namespace_has_as_well_is_gone_with_its_mount_point(
    room: Room,
) -> None:
    # Removing a directory detaches what is mounted on it in any namespace (detach_mounts in
    # fs/namespace.c).
    room.agent.start()
    room.plug_and_check()
    with process(pin_in_a_namespace, room.point()):
        room.pull_and_check()
        room.plug_and_check()
    room.pull_and_check()


@pytest.mark.parametrize("hold", [hold_open, be_inside])
def test_a_medium_in_use_when_the_agent_stops_is_detached_and_its_data_are_on_it(
    room: Room, hold: Callable[[Path], Iterator[None]]
) -> None:
    room.agent.start()
    room.plug_and_check()
    (room.point() / "written").write_bytes(b"last")
    with process(hold, room.point()):
        room.agent.stop()
        assert not room.point().exists()
    until(lambda: mappings() == [])
    room.agent.start()
    room.agent.until_said("mounted: at")
    assert (room.point() / "written").read_bytes() == b"last"
    (room.point() / "written").unlink()
