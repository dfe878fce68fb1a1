"""A mount is known by its number and its device, not by the text of its path or source."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from kernel.agents import Room, mounts
from kernel.witness import attempt, run


@contextmanager
def bound_to_itself(room: Room, kind: str) -> Iterator[None]:
    """Bind the mount root to itself, with the propagation of its parent or none."""
    root = str(room.mount_root)
    run("mount", "--bind", root, root)
    run("mount", f"--make-{kind}", root)
    try:
        yield
    finally:
        run("umount", root)


def release_by_rules(room: Room) -> None:
    """Have the medium released from nobody's hands, and mounted again read-only."""
    room.configure("mount.read_only = true")
    room.agent.request_reload()
    room.agent.until_said("mounted: at .*, read-only")


def at_point(room: Room) -> list[str]:
    return [line for line in mounts() if f" {room.point()} " in line]


@pytest.fixture(params=["shared", "private"])
def bound(room: Room, request: pytest.FixtureRequest) -> Iterator[Room]:
    """A room whose mount root is bound to itself."""
    with bound_to_itself(room, request.param):
        yield room


def test_a_mount_root_that_is_bound_to_itself_keeps_no_medium(bound: Room) -> None:
    bound.agent.start()
    bound.plug_and_check()
    release_by_rules(bound)
    assert bound.point().is_mount()
    bound.pull_and_check()
    assert at_point(bound) == []


@pytest.mark.parametrize("kind", ["shared", "private"])
def test_a_medium_below_a_mount_over_the_root_is_released_and_the_next_is_served(
    room: Room, kind: str
) -> None:
    room.agent.start()
    room.plug_and_check()
    with bound_to_itself(room, kind):
        assert not room.point().is_mount()
        room.pull_and_check()
        assert at_point(room) == []
        room.plug_and_check()
        room.pull_and_check()


def test_a_medium_below_a_mount_over_the_root_is_flushed_at_a_stop(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    (room.point() / "written").write_bytes(b"last")
    with bound_to_itself(room, "shared"):
        room.agent.stop()
        room.check_released()
    room.agent.start()
    room.agent.until_said("mounted: at")
    assert (room.point() / "written").read_bytes() == b"last"
    (room.point() / "written").unlink()


def test_a_filesystem_whose_source_is_named_like_the_mapping_is_no_mount_of_it(
    room: Room,
) -> None:
    room.agent.start()
    room.plug_and_check()
    node = at_point(room)[0].rpartition(" - ")[2].split()[1]
    run("mount", "-t", "tmpfs", node, "/mnt")
    try:
        release_by_rules(room)
        room.pull_and_check()
        room.plug_and_check()
        assert "conflict" not in room.agent.everything()
    finally:
        attempt("umount", "/mnt")


def test_a_medium_that_is_mounted_twice_at_its_point_is_released_at_a_stop(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    run("mount", "--bind", str(room.point()), str(room.point()))
    room.agent.stop()
    room.check_released()
    assert at_point(room) == []
