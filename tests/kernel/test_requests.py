"""Users of a volume, blobs that are added late and rules that change, on the real kernel."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caam_hotplug.kernel import devmapper, open_files
from caam_hotplug.kernel.inotify import Directory
from caam_hotplug.model import Mapping
from fakes.contract import until
from kernel.agents import Room
from kernel.holders import (
    be_confined_like_a_service,
    be_inside,
    be_inside_in_a_namespace,
    hold_open,
    map_it,
    pin_in_a_namespace,
    process,
    write_on,
)


def search_as(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a search for users leave out the room's agent, as a search of its own does."""
    monkeypatch.setattr(os, "getpid", lambda: room.agent.pid)


def only_mapping() -> Mapping:
    (mapping,) = devmapper.ours()
    return mapping


@pytest.mark.parametrize(
    ("hold", "words"),
    [
        (hold_open, "has {}/hello.txt open"),
        (write_on, "has {}/growing open"),
        (map_it, "has {}/mapped in memory"),
        (be_inside, "works in {}"),
        (be_inside_in_a_namespace, "works in {}"),
        (pin_in_a_namespace, "has it mounted at {} in a mount namespace of its own"),
    ],
)
def test_the_users_of_a_volume_are_named_with_what_they_use(
    room: Room,
    hold: Callable[[Path], Iterator[None]],
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room.agent.start()
    room.plug_and_check()
    search_as(room, monkeypatch)
    assert open_files.find(only_mapping()) == []
    with process(hold, room.point()):
        found = open_files.find(only_mapping())
        assert words.format(room.point()) in [holder.holds for holder in found]
        assert len({holder.pid for holder in found}) == 1
        assert found[0].command == Path("/proc/self/comm").read_text().strip()
    room.pull_and_check()


def test_the_users_of_a_volume_are_ended_and_no_other_programs(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.agent.start()
    room.plug_and_check()
    search_as(room, monkeypatch)
    others = (be_confined_like_a_service, pin_in_a_namespace)
    with process(others[0], room.point()), process(others[1], room.point()):
        pid = os.fork()
        if pid == 0:
            os.chdir(room.point())
            signal.pause()
        until(lambda: [h.pid for h in open_files.find(only_mapping()) if h.is_user] == [pid])
        open_files.end(only_mapping(), signal.SIGTERM, 60)
        _, status = os.waitpid(pid, 0)
        assert os.WTERMSIG(status) == signal.SIGTERM
        (pins,) = open_files.find(only_mapping())
        assert not pins.is_user
    room.pull_and_check()


def test_a_copy_of_the_mount_that_follows_an_unmount_is_no_user(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    room.agent.start()
    room.plug_and_check()
    search_as(room, monkeypatch)
    with process(be_confined_like_a_service, room.point()):
        assert open_files.find(only_mapping()) == []
        room.agent.stop()
        room.check_released()


def test_a_blob_that_is_added_after_its_medium_unlocks_the_medium(room: Room) -> None:
    blob = room.blobs / f"{room.medium.label}.bb"
    content = blob.read_bytes()
    blob.unlink()
    room.agent.start()
    room.medium.plug()
    room.agent.until_said("waiting: no blob")
    (room.blobs / ".coming").write_bytes(content)
    (room.blobs / ".coming").rename(blob)
    room.check_served()
    room.pull_and_check()


def test_a_blob_directory_that_is_made_after_its_medium_is_noticed(room: Room) -> None:
    elsewhere = room.blobs.with_name("elsewhere")
    room.blobs.rename(elsewhere)
    room.agent.start()
    room.medium.plug()
    room.agent.until_said("waiting: no blob")
    elsewhere.rename(room.blobs)
    room.check_served()
    room.pull_and_check()


def test_changed_rules_apply_to_a_mounted_medium_after_a_reload(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    room.configure("mount.read_only = true")
    room.agent.request_reload()
    room.agent.until_said("mounted: at .*read-only")
    room.pull_and_check()


def test_a_faulty_configuration_leaves_the_rules_in_force(room: Room) -> None:
    room.agent.start()
    room.plug_and_check()
    room.configure("mount.read_onli = true")
    room.agent.request_reload()
    room.agent.until_said("mount.read_onli: is not a key here; did you mean 'read_only'")
    room.agent.until_said("the rules before stay in force")
    room.check_still_mounted()
    room.configure()
    room.pull_and_check()


def test_a_watched_directory_reports_files_when_they_are_complete(tmp_path: Path) -> None:
    blobs = tmp_path / "a" / "blobs"
    watched = Directory(blobs)
    try:
        blobs.mkdir(parents=True)
        assert None in watched.read()
        assert watched.read() in ([], [None])
        with (blobs / "one.bb").open("wb") as file:
            file.write(b"half")
            file.flush()
            first = watched.read()
        assert "one.bb" in [*first, *watched.read()]
        (tmp_path / "two").write_bytes(b"")
        (tmp_path / "two").rename(blobs / "two.bb")
        assert watched.read() == ["two.bb"]
        (blobs / "one.bb").unlink()
        (blobs / "two.bb").unlink()
        blobs.rmdir()
        assert None in watched.read()
    finally:
        watched.close()
