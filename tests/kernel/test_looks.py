"""What the kernel reports to nobody is seen before a medium is released."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import devmapper
from kernel.agents import Room, mappings, room_of
from kernel.cartridges import cartridges
from kernel.witness import attempt, run

_FIFREEZE: Final = 0xC0045877
BY_ERROR: Final = "its filesystem has become read-only by an error"
OFFLINE: Final = "the kernel has taken its disk offline"


@pytest.fixture
def served(room: Room) -> Room:
    """A room whose medium is mounted."""
    room.agent.start()
    room.plug_and_check()
    return room


@contextmanager
def taken_offline(room: Room) -> Iterator[None]:
    """Have the kernel give up the medium's disk meanwhile."""
    state = room.medium.disk / "device/state"
    state.write_text("offline\n")
    try:
        yield
    finally:
        if state.exists():
            state.write_text("running\n")


def ext4_name() -> str:
    (mapping,) = devmapper.ours()
    return mapping.node.rpartition("/")[2]


def test_the_error_of_an_ext4_is_seen_at_a_departure(served: Room) -> None:
    with served.agent.suspended():
        Path(f"/sys/fs/ext4/{ext4_name()}/trigger_fs_error").write_text("by a test")
        served.medium.pull()
    served.wait_until_released()
    served.agent.until_said("removed-unsafely")


def test_a_disk_that_is_offline_is_said_and_stays_also_when_its_card_counts_as_changed(
    served: Room,
) -> None:
    with taken_offline(served):
        served.agent.until_said(OFFLINE)
        served.agent.until_said_ever("it counts as it was")
        assert served.point().is_mount()
        assert "detaching" not in served.agent.everything()
    served.pull_and_check()


def test_a_stop_releases_a_disk_that_is_offline(served: Room) -> None:
    with (served.point() / "written").open("wb") as file:
        file.write(os.urandom(1 << 20))
    with taken_offline(served):
        served.agent.stop()
        served.check_released()
        assert OFFLINE in served.agent.everything()


@pytest.mark.parametrize("end", ["stop", "pull"])
def test_a_frozen_filesystem_leaves_no_key(served: Room, end: str) -> None:
    directory = os.open(served.point(), os.O_RDONLY)
    fcntl.ioctl(directory, _FIFREEZE, 0)
    os.close(directory)
    if end == "pull":
        served.pull_and_check()
    else:
        served.agent.stop()
        served.check_released()
    assert mappings() == []


@pytest.fixture
def fat(udev_rule: None, nothing_left: None) -> Iterator[Room]:
    """A room whose medium has a FAT filesystem, and is mounted."""
    run("modprobe", "vfat")
    with (
        cartridges(["cartridge-01", "cartridge-02"], (("mkfs.vfat",),)) as media,
        room_of(media) as room,
    ):
        room.agent.start()
        room.plug_and_check()
        yield room


def fail_fat(room: Room) -> None:
    """Have the kernel meet an error in the FAT, on which it allows no write any more."""
    file = room.point() / "written"
    file.write_bytes(os.urandom(64 << 10))
    run("sync")
    (mapping,) = devmapper.ours()
    with Path(mapping.node).open("r+b") as device:  # by the same cache as the filesystem's
        head = device.read(64)
        (sector, reserved, tables, size) = (
            int.from_bytes(head[at:end], "little")
            for at, end in ((11, 13), (14, 16), (16, 17), (22, 24))
        )
        device.seek(reserved * sector + 3)
        device.write(bytes(tables * size * sector - 3))
    Path("/proc/sys/vm/drop_caches").write_text("3")
    attempt("cat", str(file))
    assert os.statvfs(room.point()).f_flag & os.ST_RDONLY


def test_the_error_of_a_fat_is_seen_at_a_stop_and_said_by_the_next_run(fat: Room) -> None:
    fail_fat(fat)
    fat.agent.stop()
    fat.check_released()
    assert BY_ERROR in fat.agent.everything()
    fat.agent.start()
    assert BY_ERROR in fat.agent.until_said_ever("cartridge-01.*: mounted: at ")
    fat.pull_and_check()


def test_the_error_of_a_fat_is_seen_at_a_departure(fat: Room) -> None:
    fail_fat(fat)
    fat.pull_and_check()
    fat.agent.until_said("removed-unsafely")
