from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError, KernelError, UnsafePathError
from caam_hotplug.kernel import atomic_files


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[int]:
    """Open a directory to make files in."""
    file = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield file
    os.close(file)


@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_a_new_file_has_its_content_and_mode_whatever_the_umask(
    opened: int, tmp_path: Path, mode: int
) -> None:
    before = os.umask(0o077)
    try:
        atomic_files.write(opened, tmp_path / "new", b"content", mode)
    finally:
        os.umask(before)
    assert (tmp_path / "new").read_bytes() == b"content"
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["new"]


@pytest.mark.parametrize("write", [atomic_files.write, atomic_files.write_unsettled])
@pytest.mark.parametrize("kind", ["file", "link", "directory"])
def test_a_name_that_is_taken_stays_what_it_is(
    opened: int, tmp_path: Path, write: object, kind: str
) -> None:
    taken = tmp_path / "taken"
    match kind:
        case "file":
            taken.write_bytes(b"another's")
        case "link":
            taken.symlink_to("nowhere")
        case _:
            taken.mkdir()
    before = taken.lstat()
    with pytest.raises(HotplugError, match="taken: it exists, and is not overwritten"):
        write(opened, taken, b"content", 0o600)  # type: ignore[operator]
    assert taken.lstat() == before
    assert os.listdir(tmp_path) == ["taken"]


def fat(file: int, _mode: int) -> None:
    """Change modes as FAT does (fat_sanitize_mode in the kernel)."""
    os.chmod(file, 0o755)


def squashed(file: int, mode: int) -> None:
    """Change owners as some network filesystems do for root."""
    os.chmod(file, mode)
    os.chown(file, 65534, 65534)


@pytest.mark.parametrize("write", [atomic_files.write, atomic_files.write_unsettled])
@pytest.mark.parametrize("kept", [fat, squashed])
def test_a_secret_is_not_written_where_others_could_read_it(
    opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: object, kept: object
) -> None:
    monkeypatch.setattr(os, "fchmod", kept)
    with pytest.raises(HotplugError, match=r"secret: the filesystem there keeps no owners and mod"):
        write(opened, tmp_path / "secret", b"secret", 0o600)  # type: ignore[operator]
    assert os.listdir(tmp_path) == []
    atomic_files.write(opened, tmp_path / "rule", b"no secret", 0o644)
    assert os.listdir(tmp_path) == ["rule"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EPERM, "has no hard links"),
        (errno.EOPNOTSUPP, "has no hard links"),
        (errno.EIO, "Input/output error"),
    ],
)
def test_where_there_are_no_second_names_nothing_unsettled_is_left(
    opened: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    def link(*_names: str, **_folders: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(HotplugError, match=words):
        atomic_files.write_unsettled(opened, tmp_path / "blob", b"blob", 0o600)
    assert os.listdir(tmp_path) == []


def test_a_killed_runs_temporary_file_is_replaced(opened: int, tmp_path: Path) -> None:
    (tmp_path / ".new.new").write_bytes(b"half")
    atomic_files.write(opened, tmp_path / "new", b"whole", 0o600)
    assert (tmp_path / "new").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["new"]


def test_a_link_in_place_of_the_temporary_file_is_not_followed(opened: int, tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"victim")
    (tmp_path / ".new.new").symlink_to("victim")
    atomic_files.write(opened, tmp_path / "new", b"whole", 0o600)
    assert (tmp_path / "victim").read_bytes() == b"victim"


def test_a_file_is_unsettled_until_it_is_settled(opened: int, tmp_path: Path) -> None:
    atomic_files.write_unsettled(opened, tmp_path / "blob", b"blob", 0o600)
    assert (tmp_path / "blob").read_bytes() == b"blob"
    assert atomic_files.is_unsettled(opened, "blob")
    atomic_files.settle(opened, tmp_path / "blob")
    assert not atomic_files.is_unsettled(opened, "blob")
    assert os.listdir(tmp_path) == ["blob"]
    atomic_files.settle(opened, tmp_path / "blob")


def test_only_an_unsettled_file_is_taken_back(opened: int, tmp_path: Path) -> None:
    atomic_files.write(opened, tmp_path / "kept", b"kept", 0o600)
    (tmp_path / ".kept.new").write_bytes(b"another file")
    atomic_files.write_unsettled(opened, tmp_path / "blob", b"blob", 0o600)
    atomic_files.discard_unsettled(opened, tmp_path / "kept")
    atomic_files.discard_unsettled(opened, tmp_path / "blob")
    atomic_files.discard_unsettled(opened, tmp_path / "never")
    assert not (tmp_path / "blob").exists()
    assert (tmp_path / "kept").read_bytes() == b"kept"


def test_a_file_that_was_taken_back_can_be_made_anew(opened: int, tmp_path: Path) -> None:
    for content in (b"first", b"second"):
        atomic_files.discard_unsettled(opened, tmp_path / "blob")
        atomic_files.write_unsettled(opened, tmp_path / "blob", content, 0o600)
    atomic_files.settle(opened, tmp_path / "blob")
    assert (tmp_path / "blob").read_bytes() == b"second"
    assert os.listdir(tmp_path) == ["blob"]


def test_a_directory_without_room_is_an_error_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    opened = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    with pytest.raises(KernelError, match=r"^write /proc/new: "):
        atomic_files.write(opened, Path("/proc/new"), b"content", 0o600)
    os.close(opened)


def test_a_missing_folder_is_made_with_its_mode(tmp_path: Path) -> None:
    with atomic_files.folder(tmp_path / "data" / "caam", mode=0o700):
        pass
    assert stat.S_IMODE((tmp_path / "data" / "caam").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o755


def test_every_folder_that_is_made_is_on_the_disk_before_a_file_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    monkeypatch.setattr(
        os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))
    )
    with atomic_files.folder(tmp_path / "srv" / "data" / "caam", mode=0o700):
        assert synced == [str(tmp_path), str(tmp_path / "srv"), str(tmp_path / "srv" / "data")]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "caam").mkdir()
    (tmp_path / "caam").chmod(0o777)
    with (
        pytest.raises(UnsafePathError, match="can be written by others"),
        atomic_files.folder(tmp_path / "caam", mode=0o700),
    ):
        pass


def test_two_commands_do_not_make_keys_in_one_directory(opened: int, tmp_path: Path) -> None:
    other = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with (
            atomic_files.alone_in(opened, tmp_path),
            pytest.raises(HotplugError, match="another command is making a key there"),
            atomic_files.alone_in(other, tmp_path),
        ):
            pass
        with atomic_files.alone_in(other, tmp_path):
            pass
    finally:
        os.close(other)


def test_a_file_that_is_moved_has_its_new_name_and_takes_nobody_elses(
    opened: int, tmp_path: Path
) -> None:
    (tmp_path / "old").write_bytes(b"content")
    (tmp_path / "taken").write_bytes(b"another's")
    with pytest.raises(HotplugError, match="taken: it exists, and is not overwritten"):
        atomic_files.move(opened, tmp_path / "old", "taken")
    atomic_files.move(opened, tmp_path / "old", "new")
    assert (tmp_path / "new").read_bytes() == b"content"
    assert (tmp_path / "taken").read_bytes() == b"another's"
    assert sorted(os.listdir(tmp_path)) == ["new", "taken"]


def test_a_file_that_is_not_there_is_neither_moved_nor_removed(opened: int, tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=r"rename .*none: No such file"):
        atomic_files.move(opened, tmp_path / "none", "new")
    with pytest.raises(KernelError, match=r"remove .*none: No such file"):
        atomic_files.remove(opened, tmp_path / "none")
