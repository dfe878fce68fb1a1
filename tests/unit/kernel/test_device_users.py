"""Who uses a device is either seen, or not known; only what was seen is a yes or a no."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from caam_hotplug.errors import DeviceInUseError, DeviceLockedError, KernelError, UnknownError
from caam_hotplug.kernel import device_users, sysfs, sysfs_tree
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId

NOT_KNOWN = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR]
UNUSED = Volume(
    VolumeId(1, 0), "null", DeviceNumber(1, 3), DevType.DISK, Sectors(8), Bus.OTHER,
    removable=True, read_only=False,
)  # fmt: skip
"""/dev/null can be opened exclusively by anybody, as an unused device can."""


def failing(number: int) -> Any:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture(autouse=True)
def one_loop_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs, "block_names", lambda: ["loop0"])


def test_a_device_that_nothing_uses_is_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (errno.ENOENT, errno.ENODEV, errno.ENXIO):
        monkeypatch.setattr(sysfs_tree, "text", failing(number))
        device_users.require_unused(UNUSED)


def test_a_loop_device_over_it_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysfs_tree, "text", lambda *_: "/dev/null\n")
    monkeypatch.setattr(device_users, "_number_of", lambda _: UNUSED.number)
    with pytest.raises(DeviceInUseError, match="loop0 lies on it"):
        device_users.require_unused(UNUSED)


def test_a_loop_device_over_its_whole_disk_uses_a_partition(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such as `losetup -P /dev/loop0 /dev/sda; mount /dev/loop0p2`: sda2 is not held by it."""
    disk = DeviceNumber(8, 0)
    files = {"class/block/loop0/loop/backing_file": "/dev/sda\n", "class/block/sda/dev": "8:0\n"}

    def text(_root: int, file: str) -> str:
        if file not in files:
            raise FileNotFoundError(errno.ENOENT, file)
        return files[file]

    monkeypatch.setattr(sysfs, "disk_name", lambda _name: "sda")
    monkeypatch.setattr(sysfs_tree, "text", text)
    monkeypatch.setattr(device_users, "_number_of", lambda _path: disk)
    with pytest.raises(DeviceInUseError, match="loop0 lies on it"):
        device_users.require_unused(UNUSED)


@pytest.mark.parametrize("number", NOT_KNOWN)
@pytest.mark.parametrize("call", ["text", "names"])
def test_a_device_whose_users_cannot_be_seen_is_not_unused(
    monkeypatch: pytest.MonkeyPatch, number: int, call: str
) -> None:
    monkeypatch.setattr(sysfs_tree, call, failing(number))
    with pytest.raises(UnknownError, match=r"^look who uses /dev/null"):
        device_users.require_unused(UNUSED)


@pytest.mark.parametrize("number", NOT_KNOWN)
def test_a_lock_that_cannot_be_seen_is_not_known(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def require(_name: str) -> None:
        raise KernelError("lock", "/dev/sda", number)

    monkeypatch.setattr(device_users, "require_unlocked", require)
    with pytest.raises(UnknownError):
        device_users.is_locked("sda1")


def test_a_disk_that_has_gone_is_not_locked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device_users.is_locked("no-such-disk")

    def locked(_name: str) -> None:
        raise DeviceLockedError("use /dev/sda: a program has locked it")

    monkeypatch.setattr(device_users, "require_unlocked", locked)
    assert device_users.is_locked("sda1")
