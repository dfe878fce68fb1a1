"""A stopped disk is started to be flushed; no other failure of a flush is taken back."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import WritesLostError
from caam_hotplug.kernel import disk_cache, power, scsi
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId

DISK = Volume(
    VolumeId(1, 0), "null", DeviceNumber(8, 0), DevType.DISK, Sectors(8), Bus.USB,
    removable=True, read_only=False,
)  # fmt: skip


class Disk:
    """A disk whose commands fail while it is stopped, and what was done to it."""

    def __init__(self) -> None:
        self.is_stopped = True
        self.done: list[str] = []
        self.fails = ""

    def do(self, what: str) -> int:
        self.done.append(what)
        if what == self.fails or (what == "flush" and self.is_stopped):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if what in ("start", "stop"):
            self.is_stopped = what == "stop"
        return 0


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr(Libc, "sync_file_range", lambda *_: made.do("write"))
    monkeypatch.setattr(os, "fsync", lambda _: made.do("flush"))
    monkeypatch.setattr(scsi, "is_stopped", lambda _: made.is_stopped)
    monkeypatch.setattr(scsi, "start", lambda _: made.do("start"))
    monkeypatch.setattr(scsi, "stop", lambda _: made.do("stop"))
    return made


@pytest.fixture
def opened() -> Iterator[int]:
    with Path(DISK.node).open("rb") as file:
        yield file.fileno()


def test_a_stopped_disk_is_started_flushed_and_stopped_again(disk: Disk, opened: int) -> None:
    disk_cache.flush(opened, DISK)
    assert disk.done == ["write", "flush", "start", "flush", "stop"]


def test_a_disk_that_was_flushed_has_lost_nothing_if_it_does_not_stop_again(
    disk: Disk, opened: int
) -> None:
    disk.fails = "stop"
    disk_cache.flush(opened, DISK)
    assert disk.done == ["write", "flush", "start", "flush", "stop"]


def test_a_disk_that_runs_gets_no_command(disk: Disk, opened: int) -> None:
    disk.is_stopped = False
    disk_cache.flush(opened, DISK)
    assert disk.done == ["write", "flush"]


@pytest.mark.parametrize("step", ["write", "start"])
def test_what_a_stopped_disk_has_refused_is_lost(disk: Disk, opened: int, step: str) -> None:
    disk.fails = step
    with pytest.raises(WritesLostError):
        disk_cache.flush(opened, DISK)
    assert disk.done[-1] == step


def test_a_flush_that_fails_on_a_disk_that_runs_is_not_repeated(disk: Disk, opened: int) -> None:
    disk.is_stopped, disk.fails = False, "flush"
    with pytest.raises(WritesLostError):
        disk_cache.flush(opened, DISK)
    assert disk.done == ["write", "flush"]


def test_a_disk_that_fails_to_flush_once_it_runs_has_lost_data(disk: Disk, opened: int) -> None:
    disk.fails = "flush"
    with pytest.raises(WritesLostError):
        disk_cache.flush(opened, DISK)
    assert disk.done == ["write", "flush", "start", "flush", "stop"]


def test_a_card_is_no_scsi_disk(disk: Disk, opened: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> bool:
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))

    monkeypatch.setattr(scsi, "is_stopped", refuse)
    with power.started(opened, DISK.node) as was_stopped:
        assert not was_stopped
    assert disk.done == []


@pytest.mark.parametrize(
    ("said", "sense"),
    [
        ("70 00 02 00 00 00 00 0a 00 00 00 00 04 02 00 00 00 00", (2, 4, 2)),
        ("f0 00 06 00 00 00 00 0a 00 00 00 00 28 00 00 00 00 00", (6, 0x28, 0)),
        ("72 02 04 02 00 00 00 00", (2, 4, 2)),
        ("73 06 28 00 00 00 00 00", (6, 0x28, 0)),
        ("", None),
        ("70 00 02", None),
        ("72 02", None),
    ],
)
def test_sense_data_of_both_formats_are_read_and_cut_ones_say_nothing(
    said: str, sense: tuple[int, int, int] | None
) -> None:
    assert scsi.sense_of(bytes.fromhex(said)) == sense
