"""Mounting as only the real kernel shows it; the rest is in the contract."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, TypeVar

import pytest

from caam_hotplug.errors import MountError, MountPointOccupiedError
from caam_hotplug.model import Mapping
from fakes.contract import POINT, mapped, mounts_there, unmount, unmount_at
from fakes.contract import mount as mount_at
from kernel.real import RealWorld

T = TypeVar("T")


def mount(
    world: RealWorld,
    mapping: Mapping,
    kind: str = "ext4",
    options: Sequence[str] = (),
    filesystem_options: Sequence[str] = (),
) -> None:
    world.kernel.mount(
        mapping.node,
        kind,
        POINT,
        read_only=False,
        options=options,
        filesystem_options=filesystem_options,
    )


def fields(world: RealWorld) -> tuple[set[str], set[str]]:
    """Return the options of the mount and of its superblock, as mountinfo has them."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if left.split(" ")[4] == str(world.kernel.mount_root / POINT):
            return set(left.split(" ")[5].split(",")), set(right.split(" ")[2].split(","))
    raise AssertionError("it is not mounted")


def test_a_mount_has_its_options_and_those_of_its_filesystem(world: RealWorld) -> None:
    flags = ("nosuid", "nodev", "noexec", "noatime", "nosymfollow")
    with mapped(world) as mapping:
        mount(world, mapping, "ext4", flags, ("errors=remount-ro", "commit=7", "nobarrier"))
        seen, of_superblock = fields(world)
        unmount(world)
        world.kernel.remove_mount_point(POINT)
    assert seen == {"rw", *flags}
    assert {"errors=remount-ro", "commit=7", "nobarrier"} <= of_superblock


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("bogus",), "set option bogus for .*: Invalid argument .*Unknown parameter 'bogus'"),
        (("commit=x",), "set option commit=x for .*: Invalid argument .*commit"),
    ],
)
def test_a_refused_option_is_named_in_the_kernels_words(
    world: RealWorld, options: Sequence[str], says: str
) -> None:
    with mapped(world) as mapping:
        with pytest.raises(MountError, match=says):
            mount(world, mapping, filesystem_options=options)
        assert mounts_there(world) == []
        world.kernel.remove_mount_point(POINT)


def test_a_filesystem_that_the_kernel_lacks_is_named(world: RealWorld) -> None:
    with mapped(world) as mapping:
        with pytest.raises(MountError, match=r"nosuchfs.*the kernel lacks this filesystem") as no:
            mount(world, mapping, "nosuchfs")
        world.kernel.remove_mount_point(POINT)
    assert no.value.errno == errno.ENODEV


def test_a_link_at_the_mount_point_is_not_followed(world: RealWorld, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    link = world.kernel.mount_root / POINT
    link.symlink_to(elsewhere)
    with mapped(world) as mapping, pytest.raises(MountPointOccupiedError):
        mount(world, mapping)
    assert not elsewhere.is_mount()
    link.unlink()


def test_the_services_capabilities_suffice_to_mount_and_to_release(world: RealWorld) -> None:
    point = world.kernel.mount_root / POINT
    with mapped(world) as mapping:
        without_passing_for_others(lambda: mount(world, mapping))
        assert point.is_mount()
        without_passing_for_others(lambda: unmount(world))
        assert without_passing_for_others(world.kernel.our_mount_points) == [POINT]
        without_passing_for_others(lambda: world.kernel.remove_mount_point(POINT))
    assert not point.exists()


def test_they_suffice_at_a_path_of_its_own_too(world: RealWorld) -> None:
    place = str(world.folder / POINT)
    with mapped(world) as mapping:
        without_passing_for_others(lambda: mount_at(world, mapping, name=place))
        assert Path(place).is_mount()
        assert without_passing_for_others(lambda: world.kernel.place_of(mapping)) == place
        without_passing_for_others(lambda: unmount_at(world, place))
    assert not Path(place).exists()


def test_a_directory_that_the_service_cannot_look_into_is_no_mount_point(world: RealWorld) -> None:
    place = world.folder / POINT
    place.mkdir(mode=0o700)
    os.chown(place, 1000, 1000)
    why = without_passing_for_others(lambda: world.kernel.why_occupied(str(place)))
    assert f"{place} belongs to user 1000 with mode 0700, and cannot be opened" in why
    place.rmdir()


CAPABILITY_VERSION_3: Final = 0x20080522
DAC: Final = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, of which the service has neither."""


def without_passing_for_others(act: Callable[[], T]) -> T:
    """Act with root's capabilities but for DAC (capset(2)); return the result."""

    def drop_and_act() -> T:
        libc = ctypes.CDLL("libc.so.6", use_errno=True)
        header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
        sets = (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~DAC
        assert libc.capset(header, sets) == 0
        return act()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(drop_and_act).result()
