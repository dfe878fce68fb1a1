from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from caam_hotplug.daemon import events as daemon_events
from caam_hotplug.daemon.events import BlobEvents, MountChanges
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import inotify
from caam_hotplug.kernel.mount_events import MountEvents
from fakes.clock import Clock


class Supervised:
    """Notes the blobs that it hears of."""

    def __init__(self) -> None:
        self.blobs: list[str | None] = []
        self.looks: list[float] = []
        """When all mounts were looked at, by the loop's time."""

    def blob_appeared(self, name: str | None) -> None:
        self.blobs.append(name)

    def mounts_changed(self) -> None:
        self.looks.append(asyncio.get_running_loop().time())


class Watches:
    """A kernel that has no watch left for a number of attempts, or a directory that is replaced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refusals = 0
        self.real = inotify.Directory
        monkeypatch.setattr(inotify, "Directory", self.watched)

    def watched(self, path: Path) -> Any:
        if self.refusals:
            self.refusals -= 1
            raise UnknownError("watch", str(path), errno.ENOSPC)
        return self.real(path)


@pytest.fixture
def watches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watches]:
    return Watches(monkeypatch)


def run(folder: Path, supervised: Supervised, *, seconds: float) -> None:
    """Let the agent watch the folder for so long, and put a blob into it at the end."""

    async def work() -> None:
        events = BlobEvents(folder, cast("Supervisor", supervised))
        events.begin()
        await asyncio.sleep(seconds)
        (folder / "new.bb").touch()
        await asyncio.sleep(1)
        events.end()

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())


def test_new_blobs_are_reported(watches: Watches, tmp_path: Path) -> None:
    supervised = Supervised()
    run(tmp_path, supervised, seconds=0)
    assert supervised.blobs == ["new.bb"]


def test_a_watch_that_cannot_be_had_is_asked_for_again_and_then_any_blob_may_have_come(
    watches: Watches, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    watches.refusals, supervised = 3, Supervised()
    run(tmp_path, supervised, seconds=8)  # after 0, 1 and 3 s in vain
    assert supervised.blobs == [None, "new.bb"]
    first, last = caplog.messages
    assert first.endswith("ask for `retry` when a blob has come")
    assert last == f"watch {tmp_path}: the kernel watches it again"


def test_a_watch_that_is_lost_is_asked_for_again(
    watches: Watches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(watch: inotify.Directory) -> list[str | None]:
        monkeypatch.undo()
        raise UnknownError("watch", str(watch), errno.ENOSPC)

    monkeypatch.setattr(watches.real, "read", lost)
    (tmp_path / "old.bb").touch()
    supervised = Supervised()

    async def work() -> None:
        events = BlobEvents(tmp_path, cast("Supervisor", supervised))
        events.begin()
        (tmp_path / "first.bb").touch()
        await asyncio.sleep(2)
        (tmp_path / "second.bb").touch()
        await asyncio.sleep(1)
        events.end()

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())
    assert supervised.blobs == [None, "second.bb"]


@pytest.mark.parametrize(("is_another", "reported"), [(True, [None]), (False, [])])
def test_after_a_change_of_mounts_any_blob_may_be_there_if_it_is_another_directory(
    watches: Watches,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    is_another: bool,
    reported: list[None],
) -> None:
    monkeypatch.setattr(watches.real, "leads_elsewhere", lambda _: is_another)
    supervised = Supervised()

    async def work() -> None:
        events = BlobEvents(tmp_path, cast("Supervisor", supervised))
        events.begin()
        events.mounts_changed()
        events.end()
        events.mounts_changed()

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())
    assert supervised.blobs == reported


def test_a_directory_that_cannot_be_watched_after_a_change_of_mounts_is_asked_for_again(
    watches: Watches, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(watch: inotify.Directory) -> bool:
        raise UnknownError("watch", str(watch), errno.ENOSPC)

    monkeypatch.setattr(watches.real, "leads_elsewhere", lost)
    before, supervised = os.listdir("/proc/self/fd"), Supervised()

    async def work() -> None:
        events = BlobEvents(tmp_path, cast("Supervisor", supervised))
        events.begin()
        events.mounts_changed()
        await asyncio.sleep(2)
        (tmp_path / "new.bb").touch()
        await asyncio.sleep(1)
        events.end()

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())
    assert supervised.blobs == [None, "new.bb"]
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize(("refusals", "looks"), [(0, []), (1, [1]), (3, [7])])
def test_a_watch_of_the_mounts_that_the_kernel_refuses_is_asked_for_again_and_all_are_looked_at(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    refusals: int,
    looks: list[float],
) -> None:
    caplog.set_level(logging.INFO)
    left = [UnknownError("watch", "mountinfo", errno.EMFILE) for _ in range(refusals)]

    def watched() -> MountEvents:
        if left:
            raise left.pop()
        return MountEvents()

    monkeypatch.setattr(daemon_events, "MountEvents", watched)
    before, supervised = os.listdir("/proc/self/fd"), Supervised()

    async def work() -> None:
        supervisor = cast("Supervisor", supervised)
        begun = asyncio.get_running_loop().time()
        changes = MountChanges(supervisor, BlobEvents(tmp_path, supervisor))
        changes.begin()
        await asyncio.sleep(60)
        changes.end()
        supervised.looks = [at - begun for at in supervised.looks]

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())
    assert supervised.looks == looks
    levels = [record.levelname for record in caplog.records]
    assert levels == (["WARNING", "INFO"] if refusals else [])
    assert os.listdir("/proc/self/fd") == before


def test_a_watch_of_the_mounts_is_not_asked_for_after_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched() -> MountEvents:
        asked.append(1)
        raise UnknownError("watch", "mountinfo", errno.EMFILE)

    monkeypatch.setattr(daemon_events, "MountEvents", watched)

    async def work() -> None:
        supervisor = cast("Supervisor", Supervised())
        changes = MountChanges(supervisor, BlobEvents(tmp_path, supervisor))
        changes.begin()
        changes.end()
        await asyncio.sleep(60)

    with asyncio.Runner(loop_factory=Clock) as runner:
        runner.run(work())
    assert asked == [1]
