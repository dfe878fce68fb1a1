"""A disk is emptied only of what can be seen, and not flushed is not written."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from typing import Any

import pytest

from caam_hotplug.errors import HotplugError, KernelError, UnknownError, WritesLostError
from caam_hotplug.kernel import (
    block_device,
    device_users,
    emptied_disk,
    open_files,
    scsi,
    sysfs,
    sysfs_tree,
)
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId

DISK = Volume(
    VolumeId(1, 0), "sda", DeviceNumber(8, 0), DevType.DISK, Sectors(8), Bus.USB,
    removable=True, read_only=False,
)  # fmt: skip
FACTS = {"partition": "1\n", "start": "2048\n", "size": "4096\n"}
NOT_KNOWN = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR]


def failing(number: int) -> Any:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(autouse=True)
def changes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """A disk with one partition; each change of its partitions, and the partition's number."""
    made: list[tuple[int, int]] = []
    monkeypatch.setattr(sysfs_tree, "names", lambda *_: ["sda1", "queue", "sdab1"])
    monkeypatch.setattr(sysfs_tree, "text", lambda _, file: FACTS[file.rpartition("/")[2]])
    monkeypatch.setattr(
        emptied_disk, "_change", lambda _, what, which: made.append((what, which.number))
    )
    monkeypatch.setattr(emptied_disk, "disk_of", lambda _: DISK)
    monkeypatch.setattr(emptied_disk, "_held", lambda *_: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(device_users, "of_disk", lambda *_, **__: [])
    monkeypatch.setattr(open_files, "openers", lambda *_, **__: [])
    monkeypatch.setattr(Libc, "sync_file_range", lambda *_: 0)
    yield made


@pytest.mark.parametrize("number", NOT_KNOWN)
@pytest.mark.parametrize("call", ["text", "names"])
def test_a_disk_whose_partitions_cannot_be_seen_is_not_emptied(
    monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    monkeypatch.setattr(sysfs_tree, call, failing(number))
    with pytest.raises(UnknownError, match=r"^look at sda"):
        emptied_disk.has_partitions(DISK)
    with pytest.raises(UnknownError, match=r"^look at sda"):
        emptied_disk.empty(DISK)


def test_a_partition_that_goes_meanwhile_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert emptied_disk.has_partitions(DISK)
    monkeypatch.setattr(sysfs_tree, "text", failing(errno.ENOENT))
    assert not emptied_disk.has_partitions(DISK)


@pytest.mark.parametrize("number", [errno.EIO, errno.EREMOTEIO, errno.ENOSPC, errno.ENOMEM])
def test_a_failed_flush_is_lost_data_unless_its_error_says_nothing_of_them(
    monkeypatch: pytest.MonkeyPatch, changes: list[tuple[int, int]], number: int
) -> None:
    monkeypatch.setattr(os, "fsync", failing(number))
    kind: type[HotplugError] = KernelError if number == errno.ENOMEM else WritesLostError
    with pytest.raises(kind, match=r"flush /dev/sda: "):
        emptied_disk.empty(DISK)
    assert changes == [(emptied_disk._BLKPG_DEL_PARTITION, 1), (1, 1)]


def test_a_disk_is_given_back_also_if_its_new_partitions_cannot_be_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(fcntl, "ioctl", lambda *_: 0)
    emptied = emptied_disk.empty(DISK)
    monkeypatch.setattr(sysfs, "volume_at", failing(0))
    monkeypatch.setattr(sysfs_tree, "names", failing(errno.EMFILE))
    assert emptied.restore() == []
    assert emptied._opened == -1


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EINVAL])
def test_partitions_that_cannot_be_put_back_one_by_one_are_read_from_the_table(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    # The kernel adds none that overlaps another, nor one of less than a block (block/ioctl.c); both
    # it takes from a table.
    calls: list[int] = []

    def change(_: int, what: int, which: emptied_disk.Partition) -> None:
        if what == emptied_disk._BLKPG_ADD_PARTITION:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(emptied_disk, "_change", change)
    monkeypatch.setattr(fcntl, "ioctl", lambda _, request, *__: calls.append(request))
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(WritesLostError):
        emptied_disk.empty(DISK)
    assert [each for each in calls if each != scsi._SG_IO] == [block_device._BLKRRPART]
    assert "could not be put back" not in caplog.text
