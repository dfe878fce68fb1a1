from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import inotify

AT_FDCWD, RENAME_EXCHANGE = -100, 2
HELD: list[int] = []
"""Descriptors that a change has left open."""


def refused(number: int) -> object:
    def refuse(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize(
    ("call", "number", "cure"),
    [
        ("inotify_add_watch", errno.ENOSPC, "max_user_watches"),
        ("inotify_add_watch", errno.ENOMEM, "Cannot allocate memory"),
        ("inotify_init1", errno.EMFILE, "max_user_instances"),
    ],
)
def test_a_watch_that_the_kernel_refuses_leaves_nothing_open_and_is_said_with_its_cure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, call: str, number: int, cure: str
) -> None:
    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(inotify.Libc, call, refused(number))
    with pytest.raises(UnknownError, match=cure):
        inotify.Directory(tmp_path)
    assert os.listdir("/proc/self/fd") == before


def test_a_replaced_directory_that_cannot_be_watched_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "blobs"
    folder.mkdir()
    with closing(inotify.Directory(folder)) as directory:
        folder.rmdir()
        monkeypatch.setattr(inotify.Libc, "inotify_add_watch", refused(errno.ENOSPC))
        with pytest.raises(UnknownError, match="max_user_watches"):
            directory.read()


@contextmanager
def watched(path: Path, *, removals: bool = False) -> Iterator[inotify.Directory]:
    """Watch the directory; whatever happens to it, nothing stays open."""
    before = os.listdir("/proc/self/fd")
    with closing(inotify.Directory(path, removals=removals)) as directory:
        yield directory
    assert os.listdir("/proc/self/fd") == before


def renamed_above(data: Path) -> None:
    """Move the directory above away, and another one into its place."""
    data.rename(data.with_name("old"))
    data.with_name("new").rename(data)


def exchanged(data: Path) -> None:
    """Exchange the directory above for another one."""
    new, there = (os.fsencode(data.with_name(name)) for name in ("new", data.name))
    inotify.Libc.renameat2(AT_FDCWD, new, AT_FDCWD, there, RENAME_EXCHANGE)


def replaced(data: Path) -> None:
    """Move the directory itself away, and another one into its place."""
    (data / "caam").rename(data / "old")
    (data.with_name("new") / "caam").rename(data / "caam")


def made_anew(data: Path) -> None:
    """Delete the directory and make it anew."""
    (data / "caam").rmdir()
    (data / "caam").mkdir()


def made_anew_while_open(data: Path) -> None:
    """Delete the directory while a program has it open, and make it anew."""
    opened = os.open(data / "caam", os.O_PATH)
    try:
        made_anew(data)
    finally:
        HELD.append(opened)


@pytest.mark.parametrize(
    "change", [renamed_above, exchanged, replaced, made_anew, made_anew_while_open]
)
def test_a_directory_that_comes_into_the_place_of_the_watched_one_is_noticed_and_watched(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    for folder in (data, tmp_path / "new"):
        (folder / "caam").mkdir(parents=True)
    with watched(data / "caam") as directory:
        change(data)
        assert directory.read() == [None]
        (data / "caam" / "a.bb").touch()
        assert directory.read() == ["a.bb"]
        for opened in HELD:
            os.close(opened)
    HELD.clear()


def test_every_directory_on_the_path_may_come_later_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "a/b/c"
    with watched(path) as directory:
        for folder in reversed([path, *path.parents][:3]):
            folder.mkdir()
            assert directory.read() == [None]
        (path / "a.bb").touch()
        assert directory.read() == ["a.bb"]


def test_a_directory_in_the_place_of_a_file_is_noticed(tmp_path: Path) -> None:
    (tmp_path / "caam").touch()
    with watched(tmp_path / "caam") as directory:
        (tmp_path / "caam").unlink()
        (tmp_path / "caam").mkdir()
        assert directory.read() == [None]


def test_a_file_in_the_place_of_the_directory_is_reported_when_it_goes(tmp_path: Path) -> None:
    for go in (Path.unlink, lambda file: file.rename(tmp_path / "away")):
        (tmp_path / "caam").touch()
        with watched(tmp_path / "caam", removals=True) as directory:
            go(tmp_path / "caam")
            assert directory.read() == [None]


@pytest.mark.parametrize("which", ["data", "data/caam"])
def test_another_mode_or_owner_on_the_path_is_noticed(tmp_path: Path, which: str) -> None:
    (tmp_path / "data/caam").mkdir(parents=True)
    with watched(tmp_path / "data/caam") as directory:
        (tmp_path / which).chmod(0o700)
        assert directory.read() == [None]


def test_files_that_go_are_reported_only_if_that_is_asked_for(tmp_path: Path) -> None:
    for removals in (False, True):
        for name in ("a", "b"):
            (tmp_path / name).touch()
        with watched(tmp_path, removals=removals) as directory:
            (tmp_path / "a").unlink()
            (tmp_path / "b").rename(tmp_path.with_name("elsewhere"))
            assert directory.read() == (["a", "b"] if removals else [])


def test_neighbours_on_the_path_are_nothing_new(tmp_path: Path) -> None:
    (tmp_path / "data/caam").mkdir(parents=True)
    with watched(tmp_path / "data/caam") as directory:
        (tmp_path / "data/other").mkdir()
        (tmp_path / "file").touch()
        assert directory.read() == []
        assert not directory.leads_elsewhere()


def test_lost_events_mean_that_any_file_may_have_come(tmp_path: Path) -> None:
    most = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    with watched(tmp_path, removals=True) as directory:
        for number in range(most // 2):
            (tmp_path / str(number)).touch()
            (tmp_path / str(number)).unlink()
        seen: list[str | None] = []
        while more := directory.read():
            seen += more
        assert None in seen
