"""What something else uses is refused, and the refusal says who uses it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

import pytest

from caam_hotplug.errors import DeviceInUseError, KernelError
from caam_hotplug.kernel import device_users
from kernel.agents import Room
from kernel.real import volume_at
from kernel.witness import detach, loop_medium, run


class Use(Protocol):
    """A way to use a device; the value is what a refusal says of it."""

    def __call__(self, device: str, folder: Path) -> AbstractContextManager[str]: ...


@contextmanager
def mounted(device: str, folder: Path) -> Iterator[str]:
    run("mkfs.ext4", "-q", device)
    run("mount", device, str(folder))
    try:
        yield f"mounted at {folder}"
    finally:
        run("umount", str(folder))


@contextmanager
def swap(device: str, folder: Path) -> Iterator[str]:
    assert folder
    run("mkswap", device)
    run("swapon", device)
    try:
        yield "swap space"
    finally:
        run("swapoff", device)


@contextmanager
def mapped(device: str, folder: Path) -> Iterator[str]:
    assert folder
    run("dmsetup", "create", "above", "--table", f"0 8 linear {device} 0")
    try:
        yield "mapping above lies on it"
    finally:
        run("dmsetup", "remove", "--retry", "above")


@contextmanager
def looped(device: str, folder: Path) -> Iterator[str]:
    assert folder
    above = run("losetup", "-f", "--show", device).strip()
    try:
        yield f"{Path(above).name} lies on it"
    finally:
        detach(above)


@contextmanager
def checked(device: str, folder: Path) -> Iterator[str]:
    """Open the device as e2fsck does."""
    assert folder
    file = os.open(device, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    try:
        yield f"process {os.getpid()} \\(python3\\) has it open"
    finally:
        os.close(file)


every_use = pytest.mark.parametrize("use", [mounted, swap, mapped, looped, checked])


@every_use
def test_a_device_in_use_is_refused_with_its_user(use: Use, tmp_path: Path) -> None:
    with loop_medium(4 << 20) as medium:
        with use(medium.device, tmp_path) as user, pytest.raises(DeviceInUseError, match=user):
            device_users.require_unused(volume_at(medium.device))
        device_users.require_unused(volume_at(medium.device))


@every_use
def test_a_disk_is_refused_while_one_of_its_partitions_is_in_use(
    room: Room, use: Use, tmp_path: Path
) -> None:
    with room.neighbour.disposable():
        disk = volume_at(f"/dev/{room.neighbour.disk.name}")
        partition = room.neighbour.partition
        with use(partition, tmp_path) as user, pytest.raises(DeviceInUseError, match=user):
            device_users.require_unused(disk)
        device_users.require_unused(disk)


def test_a_device_that_has_gone_is_no_device_in_use() -> None:
    with loop_medium(4 << 20) as medium:
        volume = volume_at(medium.device)
        Path(medium.device).rename("/dev/moved")
        try:
            with pytest.raises(KernelError, match="No such file"):
                device_users.require_unused(volume)
        finally:
            Path("/dev/moved").rename(medium.device)


def test_the_agent_leaves_a_device_in_use_alone_and_says_who_uses_it(
    room: Room, tmp_path: Path
) -> None:
    with room.medium.disposable(), mounted(room.medium.partition, tmp_path) as user:
        room.agent.start()
        room.agent.until_said(f"failed: use {room.medium.partition}: it is in use: {user}")
        assert room.agent.calls == []
        room.check_released()
