"""What is done by hand to a mounted medium is published at once, and costs no written byte."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import devmapper
from caam_hotplug.model import Mapping
from fakes.contract import until
from kernel.agents import Room, mappings, tables
from kernel.holders import be_inside, hold_open, map_it, process
from kernel.witness import attempt, loop_medium, run

UNMOUNTED: Final = "locked: unmounted by somebody else"
OTHER_TABLE: Final = "locked: somebody else has changed the table of its mapping"


@pytest.fixture
def served(room: Room) -> Room:
    """A room whose medium is mounted."""
    room.agent.start()
    room.plug_and_check()
    return room


def mapping() -> Mapping:
    (found,) = devmapper.ours()
    return found


# unmounted


def test_a_medium_that_is_unmounted_by_hand_is_locked_and_leaves_nothing(served: Room) -> None:
    run("umount", str(served.point()))
    served.agent.until_said(UNMOUNTED)
    served.check_released()
    served.pull_and_check()
    served.agent.until_said("gone")
    assert "removed-unsafely" not in served.agent.everything()


@pytest.mark.parametrize(
    ("hold", "words"),
    [
        (hold_open, "has /hello.txt open, in a mount that was detached"),
        (map_it, "has /mapped in memory, in a mount that was detached"),
        (be_inside, "works in /, in a mount that was detached"),
    ],
    ids=["open", "in memory", "inside"],
)
def test_a_medium_that_is_detached_by_hand_names_its_holder_and_is_locked_after_it(
    served: Room, hold: Callable[[Path], Iterator[None]], words: str
) -> None:
    with process(hold, served.point()):
        run("umount", "-l", str(served.point()))
        said = served.agent.until_said("failed: unmounted by somebody else")
        assert words in said
        assert [line for line in tables(served.medium.label) if " crypt " in line]
    served.agent.until_said(UNMOUNTED)
    served.check_released()


def test_a_mount_over_the_medium_that_goes_again_changes_nothing(served: Room) -> None:
    run("mount", "-t", "tmpfs", "none", str(served.point()))
    run("umount", str(served.point()))
    run("mount", "--bind", str(served.point()), "/mnt")
    run("umount", "/mnt")
    served.check_still_mounted()
    served.pull_and_check()
    assert "somebody else" not in served.agent.everything()


def test_a_medium_that_is_unmounted_and_mounted_by_hand_at_once_is_served_as_before(
    served: Room,
) -> None:
    with served.agent.suspended():
        node = mapping().node
        run("umount", str(served.point()))
        run("mount", node, str(served.point()))
    served.check_still_mounted()
    served.agent.stop()
    served.check_released()


# remounted


def test_a_remount_by_hand_is_published_at_once_and_its_departure_judged_by_it(
    served: Room,
) -> None:
    (served.point() / "written").write_bytes(b"last")
    run("mount", "-o", "remount,ro", str(served.point()))
    served.agent.until_said("mounted: at .*, read-only")
    served.pull_and_check()
    served.agent.until_said(": gone")
    assert "removed-unsafely" not in served.agent.everything()


@pytest.mark.parametrize("command", [("umount",), ("mount", "-o", "remount,ro")])
def test_what_was_done_before_a_pull_counts_though_the_agent_hears_of_both_at_once(
    served: Room, command: tuple[str, ...]
) -> None:
    (served.point() / "written").write_bytes(b"last")
    with served.agent.suspended():
        run(*command, str(served.point()))
        served.medium.pull()
    served.wait_until_released()
    served.agent.until_said(": gone")
    assert "removed-unsafely" not in served.agent.everything()


def test_a_mount_that_is_made_read_only_over_a_writable_filesystem_is_removed_unsafely(
    served: Room,
) -> None:
    run("mount", "-o", "remount,bind,ro", str(served.point()))
    served.agent.until_said("mounted: at .*, read-only")
    served.pull_and_check()
    served.agent.until_said("removed-unsafely")


def test_a_medium_of_a_read_only_rule_that_is_made_writable_by_hand_is_removed_unsafely(
    room: Room,
) -> None:
    room.configure("mount.read_only = true")
    room.agent.start()
    room.plug_and_check()
    run("mount", "-o", "remount,rw", str(room.point()))
    room.agent.until_said("mounted: at .*, read-write")
    room.pull_and_check()
    room.agent.until_said("removed-unsafely")


# mappings


def test_a_mapping_that_is_removed_by_force_is_released_and_the_loss_is_said(
    served: Room,
) -> None:
    attempt("dmsetup", "remove", "-f", mapping().name)
    said = served.agent.until_said(OTHER_TABLE)
    assert "what was written last may be lost" in said
    served.check_released()


@contextmanager
def another_disk() -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Make a disk that is nobody's; yield its node, and what reads it past the cache."""
    with loop_medium(8 << 20) as medium:

        def content() -> bytes:
            os.sync()
            return medium.file.read_bytes()

        yield medium.device, content


@pytest.mark.parametrize("targets", [1, 400])
def test_nothing_reaches_the_disk_of_a_foreign_table(served: Room, targets: int) -> None:
    """Also by a table of more targets than the kernel reports at once."""
    with another_disk() as (disk, content):
        before = content()
        live = mapping()
        end = int(live.table[0].split()[1])
        starts = [8 * index for index in range(targets)]
        ends = [*starts[1:], end]
        lines = [f"{a} {b - a} linear {disk} {a}\n" for a, b in zip(starts, ends, strict=True)]
        with (served.point() / "written").open("wb") as file:
            file.write(os.urandom(1 << 20))
        with served.agent.suspended():
            run("dmsetup", "suspend", "--noflush", "--nolockfs", live.name)
            run("dmsetup", "reload", live.name, stdin="".join(lines).encode())
            run("dmsetup", "resume", live.name)
        said = served.agent.until_said(OTHER_TABLE)
        assert "what was written last may be lost" in said
        served.check_released()
        assert content() == before


def test_a_medium_that_is_suspended_by_hand_is_resumed_and_flushed_at_a_stop(
    served: Room,
) -> None:
    with another_disk() as (disk, content):
        before = content()
        live = mapping()
        sectors = live.table[0].split()[1]
        (served.point() / "written").write_bytes(b"last")
        run("dmsetup", "suspend", "--noflush", "--nolockfs", live.name)
        run("dmsetup", "reload", live.name, "--table", f"0 {sectors} linear {disk} 0")
        served.agent.stop()
        served.check_released()
        assert content() == before
    served.agent.start()
    served.agent.until_said("mounted: at")
    assert (served.point() / "written").read_bytes() == b"last"
    (served.point() / "written").unlink()
    served.pull_and_check()


def test_a_medium_that_is_suspended_by_hand_and_pulled_is_released(served: Room) -> None:
    run("dmsetup", "suspend", "--noflush", "--nolockfs", mapping().name)
    served.pull_and_check()
    served.agent.until_said("removed-unsafely")


def test_a_mapping_that_is_renamed_by_hand_is_released_under_its_new_name(served: Room) -> None:
    run("dmsetup", "rename", mapping().name, "mine")
    served.check_still_mounted()
    served.pull_and_check()
    until(lambda: mappings() == [])  # those of other names are not the medium's
