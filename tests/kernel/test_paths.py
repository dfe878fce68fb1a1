"""Directories of others, which only root can make."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caam_hotplug.errors import UnsafePathError
from caam_hotplug.kernel import paths
from fakes.contract import BLOB, POINT, mapped, mount
from kernel.real import RealWorld

OTHER_USER = 1000


def test_a_blob_in_another_users_directory_is_not_read(world: RealWorld) -> None:
    os.chown(world.kernel.blob_directory, OTHER_USER, 0)
    with pytest.raises(UnsafePathError, match="blobs belongs to user 1000, not to root"):
        world.kernel.read_blob(BLOB)


def test_a_blob_below_another_users_directory_is_not_read(world: RealWorld, tmp_path: Path) -> None:
    os.chown(tmp_path, OTHER_USER, 0)
    with pytest.raises(UnsafePathError, match="belongs to user 1000"):
        world.kernel.read_blob(BLOB)


def test_nothing_is_mounted_in_another_users_directory(world: RealWorld) -> None:
    os.chown(world.kernel.mount_root, OTHER_USER, 0)
    with mapped(world) as mapping, pytest.raises(UnsafePathError, match="belongs to user 1000"):
        mount(world, mapping)
    with pytest.raises(UnsafePathError):
        world.kernel.our_mount_points()
    assert list(world.kernel.mount_root.iterdir()) == []


def test_a_directory_that_a_group_writes_to_is_not_trusted(world: RealWorld) -> None:
    world.kernel.mount_root.chmod(0o775)
    with pytest.raises(UnsafePathError, match="can be written by others than root"):
        world.kernel.remove_mount_point(POINT)


def test_another_users_sticky_directory_is_not_trusted_either(world: RealWorld) -> None:
    world.kernel.mount_root.chmod(0o1777)
    with paths.directory(world.kernel.mount_root):
        os.chown(world.kernel.mount_root, OTHER_USER, 0)
    with pytest.raises(UnsafePathError), paths.directory(world.kernel.mount_root):
        pass
