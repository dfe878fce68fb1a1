"""A directory in which something is mounted stays reachable; the guest's tests mount over it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caam_hotplug import names
from caam_hotplug.kernel import mount_directories, mountinfo, paths
from caam_hotplug.kernel.mount_places import MountPlaces, seen


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    made = tmp_path / "media"
    made.mkdir()
    return made


def test_a_kept_directory_is_found_after_its_path_leads_elsewhere(root: Path) -> None:
    places, before = MountPlaces(root), opened()
    with mount_directories.mount_point(root, "a") as point:
        places.keep("a", "..", point)
    root.rename(root.with_name("hidden"))
    root.mkdir()
    with places.directory("a") as directory:
        assert os.stat(directory).st_ino == root.with_name("hidden").stat().st_ino
    with places.directory("b") as directory:
        assert os.stat(directory).st_ino == root.stat().st_ino
    places.remove("a")
    assert os.listdir(root.with_name("hidden")) == []
    assert opened() == before
    with places.directory("a") as directory:
        assert os.stat(directory).st_ino == root.stat().st_ino


def test_the_directory_that_the_path_leads_to_now_is_kept(root: Path) -> None:
    places, before = MountPlaces(root), opened()
    places.keep_seen("a")
    places.keep_seen("a")
    root.rename(root.with_name("hidden"))
    root.mkdir()
    with places.directory("a") as directory:
        assert os.stat(directory).st_ino == root.with_name("hidden").stat().st_ino
    places.remove("a")
    assert opened() == before


def test_a_directory_of_the_board_is_kept_no_more_either(root: Path) -> None:
    places, before = MountPlaces(root), opened()
    (root / "a").mkdir(mode=0o755)
    places.keep_seen("a")
    places.remove("a")
    assert opened() == before
    assert (root / "a").is_dir()
    assert names.MOUNT_POINT_MODE != 0o755


def test_a_root_that_is_not_there_has_nothing_to_remove(tmp_path: Path) -> None:
    MountPlaces(tmp_path / "nowhere").remove("a")


def test_a_name_is_unmounted_only_if_it_shows_a_mount_that_is_meant(root: Path) -> None:
    (root / "a").mkdir()
    places, before = MountPlaces(root), opened()
    there = {mount.identity for mount in mountinfo.mounts()}
    with paths.directory(root) as directory:
        shown = seen(directory, "a")
        assert seen(directory, "missing") is None
    assert shown in there
    assert not places.unmount("a", there - {shown})
    assert not places.unmount("missing", there)
    with places.directory_of("a", there) as found:
        assert found is not None
    assert opened() == before


def test_a_mount_that_the_path_leads_to_is_found_though_another_directory_is_kept(
    root: Path,
) -> None:
    places, there = MountPlaces(root), {mount.identity for mount in mountinfo.mounts()}
    places.keep_seen("a")
    root.rename(root.with_name("hidden"))
    (root / "a").mkdir(parents=True)
    with places.directory_of("a", there) as found:
        assert found is not None
        assert os.stat(found).st_ino == root.stat().st_ino
    places.forget("a")


def test_the_directory_of_a_path_is_kept_and_found_by_its_name(roots_folder: Path) -> None:
    above = roots_folder / "srv"
    above.mkdir()
    place = str(above / "recorder")
    places, before = MountPlaces(roots_folder / "media"), opened()
    there = {mount.identity for mount in mountinfo.mounts()}
    with mount_directories.mount_point(roots_folder / "media", place) as point:
        places.keep(place, "..", point)
    above.rename(above.with_name("hidden"))
    above.mkdir()
    with places.directory(place) as directory:
        assert os.stat(directory).st_ino == above.with_name("hidden").stat().st_ino
    with places.directory_of(place, there) as found:
        assert found is not None
    places.remove(place)
    assert list(above.with_name("hidden").iterdir()) == []
    assert opened() == before
