"""The directories that media are mounted on are made, used and removed as they should be."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.errors import MountPointOccupiedError, UnsafePathError
from caam_hotplug.kernel import mount_directories
from caam_hotplug.kernel.mount_places import MountPlaces


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_mount_point_is_made_with_the_mode_that_marks_it_as_ours(tmp_path: Path) -> None:
    # An ordinary user can make such a directory but not open it.
    with (
        umask(0o022),
        suppress(PermissionError),
        mount_directories.mount_point(tmp_path / "media", "a") as opened,
    ):
        assert os.path.samestat(os.fstat(opened), (tmp_path / "media" / "a").lstat())
    assert mode(tmp_path / "media") == 0o755
    assert mode(tmp_path / "media" / "a") == 0o500
    assert mount_directories.our_mount_points(tmp_path / "media") == ["a"]


def test_a_mount_point_that_was_made_can_be_removed_again(tmp_path: Path) -> None:
    before = open_files()
    with suppress(PermissionError), mount_directories.mount_point(tmp_path / "media", "a"):
        pass
    mount_directories.remove_mount_point(tmp_path / "media", "a")
    assert list((tmp_path / "media").iterdir()) == []
    assert open_files() == before


def test_an_empty_directory_of_the_boards_own_is_used_and_stays(tmp_path: Path) -> None:
    own = tmp_path / "a"
    own.mkdir()
    own.chmod(0o755)
    with mount_directories.mount_point(tmp_path, "a") as opened:
        assert os.path.samestat(os.fstat(opened), own.stat())
    mount_directories.remove_mount_point(tmp_path, "a")
    assert mode(own) == 0o755
    assert mount_directories.our_mount_points(tmp_path) == []


def occupied(root: Path, name: str) -> str:
    """Return the words of a mount point's refusal."""
    before = open_files()
    with (
        pytest.raises(MountPointOccupiedError) as caught,
        mount_directories.mount_point(root, name),
    ):
        pass
    assert open_files() == before
    return str(caught.value)


def test_a_directory_with_content_is_never_covered(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / ".keep").write_text("")
    assert occupied(tmp_path, "a") == f"{tmp_path}/a is not empty"


def test_a_file_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("kept")
    assert occupied(tmp_path, "a") == f"{tmp_path}/a is a link or a file"
    assert (tmp_path / "a").read_text() == "kept"


def test_a_link_to_an_empty_directory_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to("real")
    assert occupied(tmp_path, "a") == f"{tmp_path}/a is a link or a file"


def test_a_link_that_leads_nowhere_is_no_mount_point(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("nowhere")
    assert occupied(tmp_path, "a") == f"{tmp_path}/a is a link or a file"
    assert not (tmp_path / "nowhere").exists()


def test_a_place_where_something_is_mounted_is_no_mount_point() -> None:
    assert occupied(Path("/"), "proc") == "something is mounted at /proc"


def test_a_mount_root_that_others_may_write_to_gets_no_mount_points(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UnsafePathError), mount_directories.mount_point(tmp_path, "a"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_removing_what_is_not_there_is_done_already(tmp_path: Path) -> None:
    mount_directories.remove_mount_point(tmp_path, "a")
    mount_directories.remove_mount_point(tmp_path / "media", "a")
    assert list(tmp_path.iterdir()) == []


def test_a_mount_point_of_the_agent_with_content_stays(tmp_path: Path) -> None:
    ours = tmp_path / "a"
    ours.mkdir()
    (ours / "file").write_text("kept")
    ours.chmod(0o500)
    try:
        mount_directories.remove_mount_point(tmp_path, "a")
        assert mode(ours) == 0o500
    finally:
        ours.chmod(0o700)
    assert (ours / "file").read_text() == "kept"


def test_a_file_or_a_link_without_any_mode_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    (tmp_path / "a").chmod(0o500)
    (tmp_path / "b").symlink_to("a")
    mount_directories.remove_mount_point(tmp_path, "a")
    mount_directories.remove_mount_point(tmp_path, "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_only_directories_of_our_mode_are_ours(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours").chmod(0o500)
    (tmp_path / "own").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "file").chmod(0o500)
    (tmp_path / "link").symlink_to("ours")
    assert mount_directories.our_mount_points(tmp_path) == ["ours"]


def test_a_mount_root_that_is_not_there_has_no_mount_points_of_the_agent(tmp_path: Path) -> None:
    assert mount_directories.our_mount_points(tmp_path / "media") == []


ROOT = Path("/run/media")
"""Where names would lie; a path of its own lies elsewhere."""


def own(folder: Path, name: str = "recorder") -> str:
    return str(folder / name)


def refusal(path: str) -> str:
    """Return why nothing is mounted at the path, as it is said without an attempt, too."""
    before = open_files()
    with (
        pytest.raises(MountPointOccupiedError) as caught,
        mount_directories.mount_point(ROOT, path),
    ):
        pass
    assert mount_directories.why_occupied(ROOT, path) == str(caught.value)
    assert open_files() == before
    return str(caught.value)


def test_a_missing_directory_is_made_at_its_own_path_and_removed(roots_folder: Path) -> None:
    path, before = own(roots_folder), open_files()
    assert mount_directories.why_occupied(ROOT, path) == ""
    with umask(0o022), mount_directories.mount_point(ROOT, path) as opened:
        assert os.path.samestat(os.fstat(opened), Path(path).lstat())
    assert mode(Path(path)) == 0o1500
    assert mount_directories.our_paths([own(roots_folder, "?*")]) == [path]
    mount_directories.remove_mount_point(ROOT, path)
    assert list(roots_folder.iterdir()) == []
    assert open_files() == before


@pytest.mark.parametrize("its_mode", [0o755, 0o700, 0o500, 0o000, 0o1777])
def test_an_empty_directory_at_its_own_path_is_used_and_kept_whatever_its_mode(
    roots_folder: Path, its_mode: int
) -> None:
    path = own(roots_folder)
    Path(path).mkdir()
    Path(path).chmod(its_mode)
    with mount_directories.mount_point(ROOT, path):
        pass
    mount_directories.remove_mount_point(ROOT, path)
    assert mode(Path(path)) == its_mode
    assert mount_directories.our_paths([path]) == []


def test_a_directory_made_below_one_with_the_group_bit_is_removed_too(roots_folder: Path) -> None:
    roots_folder.chmod(0o2755)
    path = own(roots_folder)
    with mount_directories.mount_point(ROOT, path):
        pass
    assert mode(Path(path)) == 0o3500
    mount_directories.remove_mount_point(ROOT, path)
    assert list(roots_folder.iterdir()) == []


def test_a_directory_above_its_own_path_is_never_made(roots_folder: Path) -> None:
    path = own(roots_folder / "recorder")
    assert refusal(path) == (
        f"{roots_folder}/recorder is missing, and is not made by the agent: "
        f"mkdir -p {roots_folder}/recorder"
    )
    assert list(roots_folder.iterdir()) == []


@pytest.mark.parametrize("its_mode", [0o775, 0o757, 0o1777])
def test_a_path_through_a_directory_that_others_write_to_is_refused(
    roots_folder: Path, its_mode: int
) -> None:
    above = roots_folder / "above"
    (above / "below").mkdir(parents=True)
    above.chmod(its_mode)
    assert f"{above} " in refusal(own(above / "below"))
    assert list((above / "below").iterdir()) == []


def test_a_path_through_another_users_directory_is_refused(roots_folder: Path) -> None:
    os.chown(roots_folder, 1000, -1)
    assert f"{roots_folder} belongs to user 1000, not to root" in refusal(own(roots_folder))
    assert list(roots_folder.iterdir()) == []


def test_a_path_through_a_link_or_a_file_is_refused(roots_folder: Path) -> None:
    (roots_folder / "real").mkdir()
    (roots_folder / "link").symlink_to("real")
    (roots_folder / "file").write_text("")
    for name in ("link", "file"):
        words = f"{roots_folder / name} is not a directory but a link or a file"
        assert words in refusal(own(roots_folder / name))
    assert list((roots_folder / "real").iterdir()) == []


def test_what_is_not_an_empty_directory_at_its_own_path_is_refused(roots_folder: Path) -> None:
    full, link, file = (own(roots_folder, name) for name in ("full", "link", "file"))
    (roots_folder / "full" / "sub").mkdir(parents=True)
    Path(link).symlink_to("full/sub")
    Path(file).write_text("kept")
    assert refusal(full) == f"{full} is not empty"
    assert refusal(link) == f"{link} is a link or a file"
    assert refusal(file) == f"{file} is a link or a file"
    for each in (full, link, file):
        mount_directories.remove_mount_point(ROOT, each)
    assert len(list(roots_folder.iterdir())) == 3


def test_only_directories_with_the_mode_of_their_place_are_found(roots_folder: Path) -> None:
    for name, its_mode in (("path", 0o1500), ("name", 0o500), ("own", 0o755)):
        (roots_folder / name).mkdir()
        (roots_folder / name).chmod(its_mode)
    assert mount_directories.our_mount_points(roots_folder) == ["name"]
    globs = [own(roots_folder, "?*"), own(roots_folder / "missing")]
    assert mount_directories.our_paths(globs) == [own(roots_folder, "path")]


def test_a_directory_at_its_own_path_is_removed_though_others_may_write_there_now(
    roots_folder: Path,
) -> None:
    path = own(roots_folder)
    with mount_directories.mount_point(ROOT, path):
        pass
    roots_folder.chmod(0o777)
    mount_directories.remove_mount_point(ROOT, path)
    assert list(roots_folder.iterdir()) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_directory_at_its_own_path_is_left_where_nothing_can_be_removed(
    roots_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    path = own(roots_folder)
    with mount_directories.mount_point(ROOT, path):
        pass

    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as without:
        without.setattr(os, "rmdir", refused)
        mount_directories.remove_mount_point(ROOT, path)
    assert f"{path} is left, since it cannot be removed: {os.strerror(number)}" in caplog.text
    mount_directories.remove_mount_point(ROOT, path)
    assert list(roots_folder.iterdir()) == []


def test_no_directory_is_removed_through_a_link(roots_folder: Path) -> None:
    (roots_folder / "real").mkdir()
    with mount_directories.mount_point(ROOT, own(roots_folder / "real")):
        pass
    (roots_folder / "link").symlink_to("real")
    mount_directories.remove_mount_point(ROOT, own(roots_folder / "link"))
    MountPlaces(ROOT).remove(own(roots_folder / "link"))
    assert (roots_folder / "real" / "recorder").is_dir()


def test_a_folder_that_is_not_safe_has_no_mount_points_of_the_agent(roots_folder: Path) -> None:
    with mount_directories.mount_point(ROOT, own(roots_folder)):
        pass
    roots_folder.chmod(0o777)
    assert mount_directories.our_paths([own(roots_folder)]) == []


def test_an_empty_directory_that_the_service_cannot_look_into_is_refused(
    roots_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, opens = own(roots_folder), os.open
    Path(path).mkdir(mode=0o700)
    os.chown(path, 1000, -1)

    def without_the_right(name: object, *rest: object, **more: object) -> int:
        if name == "recorder":
            raise PermissionError(13, "Permission denied")
        return opens(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without_the_right)
    assert refusal(path).startswith(
        f"open {path}: {path} belongs to user 1000 with mode 0700, and cannot be opened; chown "
    )


def test_a_directory_of_another_user_stays_whatever_its_mode(roots_folder: Path) -> None:
    path = own(roots_folder)
    Path(path).mkdir()
    os.chown(path, 1000, -1)
    Path(path).chmod(0o1500)
    with mount_directories.mount_point(ROOT, path):
        pass
    mount_directories.remove_mount_point(ROOT, path)
    assert mount_directories.our_paths([path]) == []
    assert Path(path).is_dir()


def test_only_paths_that_a_rule_names_are_found(roots_folder: Path) -> None:
    for name in ("of-a-service", "data-", "data-1"):
        (roots_folder / name).mkdir()
        (roots_folder / name).chmod(0o1500)
    assert mount_directories.our_paths([own(roots_folder)]) == []
    globs = [own(roots_folder, "data-?*"), own(roots_folder, "data-1")]
    assert mount_directories.our_paths(globs) == [own(roots_folder, "data-1")]


def test_a_directory_is_not_removed_between_its_making_and_the_mount(roots_folder: Path) -> None:
    path = own(roots_folder)
    with mount_directories.mount_point(ROOT, path):
        mount_directories.remove_mount_point(ROOT, path)
        assert Path(path).is_dir()
    mount_directories.remove_mount_point(ROOT, path)
    assert not Path(path).exists()


def test_a_directory_is_made_once_its_removal_has_ended(
    roots_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, rmdir, made = own(roots_folder), os.rmdir, threading.Event()

    def make() -> None:
        with mount_directories.mount_point(ROOT, path):
            made.set()

    maker = threading.Thread(target=make)

    def remove_while_another_makes_it(*args: Any, **named: Any) -> None:
        maker.start()
        assert not made.wait(0.1)
        rmdir(*args, **named)

    with mount_directories.mount_point(ROOT, path):
        pass
    monkeypatch.setattr(os, "rmdir", remove_while_another_makes_it)
    mount_directories.remove_mount_point(ROOT, path)
    maker.join()
    assert Path(path).is_dir()


def test_an_empty_subvolume_is_used_though_it_has_a_device_of_its_own(
    roots_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = roots_folder / "recorder"
    path.mkdir()
    number, fstat = path.stat().st_ino, os.fstat

    def of_btrfs(opened: int) -> os.stat_result:
        found = fstat(opened)
        if found.st_ino != number:
            return found
        return os.stat_result((*found[:2], found.st_dev + 1, *found[3:10]))

    monkeypatch.setattr(os, "fstat", of_btrfs)
    assert mount_directories.why_occupied(ROOT, str(path)) == ""
