"""A disk that is held is the one that was found; /dev/null stands for a disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import disks, sysfs
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId

FOUND = VolumeId(9, 0)
CHANGED = r"^hold /dev/null: its medium was changed meanwhile; nothing was written to the one"


def disk(major: int = 1, minor: int = 3) -> Volume:
    """Return the disk that was found at the node."""
    number, kind = DeviceNumber(major, minor), DevType.DISK
    return Volume(FOUND, "null", number, kind, Sectors(8), Bus.USB, True, False)


@pytest.fixture
def present(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[VolumeId | None]]:
    """Return a list whose one entry is the medium in the disk."""
    now: list[VolumeId | None] = [FOUND]
    monkeypatch.setattr(sysfs, "present_id", lambda _name: now[0])
    yield now


@pytest.mark.usefixtures("present")
def test_a_disk_is_written_to_by_one_descriptor() -> None:
    with disks.held(disk()) as hold:
        assert hold.writing() == hold.writing() != hold.reading


@pytest.mark.parametrize("now", [VolumeId(10, 0), None])
def test_a_medium_that_was_changed_before_it_is_held_is_not_held(
    present: list[VolumeId | None], now: VolumeId | None
) -> None:
    present[0] = now
    with pytest.raises(HotplugError, match=CHANGED), disks.held(disk()):
        pass


@pytest.mark.parametrize("now", [VolumeId(10, 0), None])
@pytest.mark.parametrize("writes", [0, 1])
def test_a_medium_that_was_changed_while_it_is_held_is_not_written_to(
    present: list[VolumeId | None], now: VolumeId | None, writes: int
) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with disks.held(disk()) as hold:
        for _ in range(writes):
            hold.writing()
        present[0] = now
        with pytest.raises(HotplugError, match=CHANGED):
            hold.writing()
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.usefixtures("present")
def test_another_disk_at_the_node_is_not_held() -> None:
    with pytest.raises(HotplugError, match=CHANGED), disks.held(disk(8, 0)):
        pass


def test_a_serial_number_is_read_where_each_kind_of_disk_has_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(disks, "_SYS_BLOCK", tmp_path)
    page = tmp_path / "null/device/vpd_pg80"
    page.parent.mkdir(parents=True)
    assert disks.serial(disk()) is None
    page.write_bytes(b"\0\x80\0\x04    ")
    assert disks.serial(disk()) is None
    page.write_bytes(b"\0\x80\0\x042000")
    assert disks.serial(disk()) == "2000"
    (tmp_path / "null/serial").write_text("virtio-1")
    assert disks.serial(disk()) == "virtio-1"
    assert disks.serial(replace(disk(), serial="0x5a")) == "0x5a"
