from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel import offline, sysfs_tree
from caam_hotplug.model import VolumeId


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The state's file of a disk with one partition, below a sysfs of this test's own."""
    disk = tmp_path / "devices/sdb"
    (disk / "sdb1").mkdir(parents=True)
    (disk / "sdb1/partition").write_text("1\n")
    (disk / "device").mkdir()
    block = tmp_path / "class/block"
    block.mkdir(parents=True)
    (block / "sdb").symlink_to("../../devices/sdb")
    (block / "sdb1").symlink_to("../../devices/sdb/sdb1")
    opened = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    monkeypatch.setattr(sysfs_tree, "root", lambda: opened)
    yield disk / "device/state"
    os.close(opened)


@pytest.mark.parametrize("name", ["sdb", "sdb1"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("running\n", False),
        ("blocked\n", False),
        ("live\n", False),
        ("offline\n", True),
        ("transport-offline\n", True),
        ("dead\n", True),
    ],
)
def test_a_disk_is_offline_if_the_kernel_has_given_it_up(
    state: Path, name: str, text: str, *, expected: bool
) -> None:
    state.write_text(text)
    assert offline.is_offline(name) is expected


def test_a_disk_of_a_kind_without_that_state_or_that_has_gone_is_not_offline(state: Path) -> None:
    assert not offline.is_offline("sdb1")
    assert not offline.is_offline("sdc1")
    assert not state.exists()


@pytest.mark.parametrize(
    "number",
    [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR],
)
def test_a_state_that_cannot_be_read_is_not_known(
    state: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_arguments: object, **_named: object) -> None:
        raise OSError(number, os.strerror(number))

    state.write_text("offline\n")
    monkeypatch.setattr(sysfs_tree, "text", fails)
    with pytest.raises(UnknownError):
        offline.is_offline("sdb1")


def test_a_disk_that_is_offline_is_not_flushed(state: Path) -> None:
    state.write_text("running\n")
    offline.require_online("sdb")
    state.write_text("offline\n")
    with pytest.raises(KernelError, match="the kernel has taken the disk offline"):
        offline.require_online("sdb")


def test_a_medium_that_seems_to_be_another_is_not_known_while_its_disk_is_offline(
    state: Path,
) -> None:
    one, other = VolumeId(7, 1), VolumeId(8, 1)
    state.write_text("offline\n")
    for before, now in ((one, one), (None, one), (one, None)):
        offline.require_known("sdb1", before, now)
    with pytest.raises(UnknownError, match="the kernel has taken the disk offline"):
        offline.require_known("sdb1", one, other)
    state.write_text("running\n")
    offline.require_known("sdb1", one, other)
