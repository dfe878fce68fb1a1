"""What keeps a medium from being served ends, and it is served without anybody's request."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import devmapper
from fakes.contract import until
from kernel.agents import ARRIVAL, Room, mappings
from kernel.forked import Stop
from kernel.holders import process
from kernel.test_journals import MAKERS, folder, mapped, plugged
from kernel.witness import run

SYSCTL: Final = Path("/proc/sys/fs/inotify")
ACTIVATED: Final = ARRIVAL.index("dm resume") + 1
"""Calls of an arrival until its mapping is live, and nothing has been read by it."""


@contextmanager
def blob_partition(room: Room) -> Iterator[Path]:
    """Make a filesystem with the blobs, whose directory in the agent's configuration is empty."""
    elsewhere = room.blobs.with_name("partition")
    elsewhere.mkdir(mode=0o755)
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "blobs", str(elsewhere))
    try:
        for blob in room.blobs.iterdir():
            shutil.move(blob, elsewhere)
        yield elsewhere
    finally:
        while room.blobs.is_mount():
            run("umount", str(room.blobs))
        run("umount", str(elsewhere))
        elsewhere.rmdir()


def bound(partition: Path, blobs: Path) -> None:
    """Mount the partition with the blobs over their directory."""
    run("mount", "--bind", str(partition), str(blobs))


def mounted_then_filled(partition: Path, blobs: Path) -> None:
    """Mount another filesystem there, and write the blobs to it."""
    run("mount", "-t", "tmpfs", "-o", "mode=0755", "blobs", str(blobs))
    for blob in partition.iterdir():
        shutil.copy(blob, blobs / ".coming")
        (blobs / ".coming").rename(blobs / blob.name)


@pytest.mark.parametrize("come", [bound, mounted_then_filled])
def test_a_blob_directory_that_is_mounted_after_the_start_is_read(
    room: Room, come: Callable[[Path, Path], None]
) -> None:
    with blob_partition(room) as partition:
        room.agent.start()
        room.medium.plug()
        room.agent.until_said("waiting: no blob")
        come(partition, room.blobs)
        room.check_served()
        room.pull_and_check()
        run("umount", str(room.blobs))
        room.agent.forget()
        room.medium.plug()
        room.agent.until_said("waiting: no blob")
        come(partition, room.blobs)
        room.check_served()
        room.pull_and_check()


def test_a_directory_above_the_blobs_that_is_replaced_after_the_start_is_read(room: Room) -> None:
    inner = room.blobs / "inner/blobs"
    room.configuration.write_text(
        room.configuration.read_text().replace(f'"{room.blobs}"', f'"{inner}"')
    )
    inner.mkdir(parents=True, mode=0o755)
    room.agent.start()
    room.medium.plug()
    room.agent.until_said("waiting: no blob")
    later = room.blobs / "later"
    (later / "blobs").mkdir(parents=True)
    shutil.copy(room.blobs / f"{room.medium.label}.bb", later / "blobs")
    inner.parent.rename(room.blobs / "before")
    later.rename(inner.parent)
    room.check_served()
    room.pull_and_check()


def test_a_blob_directory_with_the_wrong_mode_is_read_once_that_is_mended(room: Room) -> None:
    room.blobs.chmod(0o777)
    room.agent.start()
    room.medium.plug()
    room.agent.until_said("failed: .*can be written by others than root")
    room.blobs.chmod(0o755)
    room.check_served()
    room.pull_and_check()


@contextmanager
def others_mount(room: Room) -> Iterator[Callable[[], object]]:
    """Mount something at the medium's mount point; yield what ends that."""
    with directory(room) as point:
        run("mount", "-t", "tmpfs", "-o", "mode=0755", "others", str(point))
        yield lambda: run("umount", str(point))


@contextmanager
def bound_directory(room: Room) -> Iterator[Callable[[], object]]:
    """Mount a directory of the same filesystem there."""
    with directory(room) as point:
        run("mount", "--bind", str(room.blobs), str(point))
        yield lambda: run("umount", str(point))


@contextmanager
def content(room: Room) -> Iterator[Callable[[], object]]:
    """Put a file into the directory at the mount point."""
    with directory(room) as point:
        (point / "file").touch()
        yield (point / "file").unlink


@contextmanager
def directory(room: Room) -> Iterator[Path]:
    """Make the directory of the mount point, which the agent leaves as it is."""
    room.point().mkdir()
    yield room.point()
    until(lambda: not room.point().is_mount())
    room.point().rmdir()


@contextmanager
def file(room: Room) -> Iterator[Callable[[], object]]:
    """Put a file in the place of the mount point."""
    room.point().touch()
    yield room.point().unlink


@contextmanager
def moved_away(room: Room) -> Iterator[Callable[[], object]]:
    """Put a directory with content there, which is moved away as a whole."""
    point, away = room.point(), room.blobs / "away"
    (point / "folder").mkdir(parents=True)
    yield lambda: point.rename(away)


@pytest.mark.parametrize("occupant", [others_mount, bound_directory, content, file, moved_away])
def test_a_conflict_ends_when_what_has_the_mount_point_goes(
    room: Room, occupant: Callable[[Room], AbstractContextManager[Callable[[], object]]]
) -> None:
    room.agent.start()
    with occupant(room) as go:
        room.medium.plug()
        room.agent.until_said("conflict: ")
        go()
        room.check_served()
        room.medium.pull()


def hold_node(node: Path) -> Iterator[None]:
    with node.open("rb"):
        yield
        signal.pause()


def test_a_conflict_says_who_holds_the_mapping_until_it_is_closed(room: Room) -> None:
    room.agent.start(Stop(ACTIVATED))
    with content(room) as go:
        room.medium.plug()
        room.agent.until_called(ACTIVATED)
        (mapping,) = devmapper.ours()
        with process(hold_node, Path(mapping.node)):
            room.agent.go_on()
            said = f"is not empty; mapping {mapping.name} is held open: pid \\d+"
            room.agent.until_said(f"conflict: .* {said}")
            assert mappings() == [mapping.name]
        room.agent.until_said("conflict: .* is not empty$")
        assert mappings() == []
        go()
        room.check_served()
        room.medium.pull()


def test_a_copy_of_a_mounted_btrfs_is_served_when_the_first_one_has_gone(room: Room) -> None:
    with folder() as where:
        first, second = where / "first", where / "second"
        first.touch()
        os.truncate(first, 130 << 20)
        layout = f'label: gpt\nstart=2048, name="{room.medium.label}"\n'
        run("sfdisk", "-q", str(first), stdin=layout.encode())
        with plugged(first, read_only=False) as device, mapped(f"{device}p1") as node:
            run(*MAKERS["btrfs"], node)
        run("cp", "--sparse=always", str(first), str(second))
        run("sfdisk", "-q", "--part-label", str(second), "1", room.neighbour.label)
        room.agent.start()
        with plugged(second, read_only=False), plugged(first, read_only=False):
            room.agent.until_said_ever(": mounted: at ")
            room.agent.until_said_ever("failed: mount .*File exists")
            served = room.neighbour if room.point(room.neighbour).is_mount() else room.medium
            other = room.medium if served is room.neighbour else room.neighbour
            run("umount", str(room.point(served)))
            room.agent.until_said_ever(f"{other.label}.*: mounted: at ")
            assert len([d for d in (served, other) if room.point(d).is_mount()]) == 1


@contextmanager
def exhausted(limit: str) -> Iterator[None]:
    """Let no more inotify watches, or instances, be made meanwhile."""
    file = SYSCTL / limit
    before = file.read_text()
    file.write_text("0")
    try:
        yield
    finally:
        file.write_text(before)


@pytest.mark.parametrize("limit", ["max_user_watches", "max_user_instances"])
def test_media_cost_no_descriptor_while_no_inotify_watch_is_left(room: Room, limit: str) -> None:
    with exhausted(limit):
        room.agent.start()
        room.plug_and_check()
        room.pull_and_check()
        before = len(os.listdir(f"/proc/{room.agent.pid}/fd"))
        for _ in range(3):
            room.plug_and_check()
            room.pull_and_check()
        (room.point()).touch()
        room.medium.plug()
        room.agent.until_said("conflict: ")
        room.medium.pull()
        room.agent.until_said(": gone")
        room.point().unlink()
        assert len(os.listdir(f"/proc/{room.agent.pid}/fd")) == before
    room.agent.until_said_ever("the kernel watches it again")
    blob = room.blobs / f"{room.medium.label}.bb"
    kept = blob.rename(room.blobs / "kept")
    room.agent.forget()
    room.medium.plug()
    room.agent.until_said("waiting: no blob")
    kept.rename(blob)
    room.check_served()
    room.pull_and_check()
