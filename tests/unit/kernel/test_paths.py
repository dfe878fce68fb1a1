from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caam_hotplug.errors import UnsafePathError
from caam_hotplug.kernel import paths


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


def test_the_descriptor_stands_for_the_directory_while_it_is_held(tmp_path: Path) -> None:
    before = open_files()
    with paths.directory(tmp_path) as here:
        assert os.path.samestat(os.fstat(here), tmp_path.stat())
        assert open_files() == before + 1
    assert open_files() == before


def test_a_missing_directory_is_the_kernels_error(tmp_path: Path) -> None:
    before = open_files()
    with pytest.raises(FileNotFoundError), paths.directory(tmp_path / "no" / "such"):
        pass
    assert list(tmp_path.iterdir()) == []
    assert open_files() == before


def test_missing_directories_are_made_for_everyone_to_pass_through(tmp_path: Path) -> None:
    with umask(0o022), paths.directory(tmp_path / "run" / "media", create=True) as here:
        assert os.path.samestat(os.fstat(here), (tmp_path / "run" / "media").stat())
    assert (mode(tmp_path / "run"), mode(tmp_path / "run" / "media")) == (0o755, 0o755)


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "media").mkdir(mode=0o700)
    with paths.directory(tmp_path / "media", create=True) as here:
        assert stat.S_IMODE(os.fstat(here).st_mode) == 0o700


@pytest.mark.parametrize("create", [False, True])
def test_a_link_in_the_path_is_refused_wherever_it_leads(create: bool, tmp_path: Path) -> None:
    (tmp_path / "real" / "media").mkdir(parents=True)
    link = tmp_path / "link"
    link.symlink_to("real")
    before = open_files()
    with (
        pytest.raises(UnsafePathError) as caught,
        paths.directory(link / "media", create=create),
    ):
        pass
    assert str(caught.value) == (
        f"open {link}/media: {link} is not a directory but a link or a file; "
        "name a path without links"
    )
    assert open_files() == before


def test_a_link_at_the_end_of_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    with (
        pytest.raises(UnsafePathError, match="is not a directory but a link or a file"),
        paths.directory(tmp_path / "link"),
    ):
        pass


def test_a_link_that_leads_nowhere_is_not_made_a_directory(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with (
        pytest.raises(UnsafePathError, match="is not a directory but a link or a file"),
        paths.directory(tmp_path / "link", create=True),
    ):
        pass
    assert not (tmp_path / "nowhere").exists()


def test_a_file_in_the_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UnsafePathError, match="is not a directory but a link or a file"),
        paths.directory(tmp_path / "file" / "media"),
    ):
        pass


@pytest.mark.parametrize("others", [0o775, 0o757, 0o777])
def test_a_directory_that_others_may_write_to_is_refused(others: int, tmp_path: Path) -> None:
    shared = tmp_path / "shared"
    (shared / "media").mkdir(parents=True)
    shared.chmod(others)
    before = open_files()
    with pytest.raises(UnsafePathError) as caught, paths.directory(shared / "media"):
        pass
    assert str(caught.value) == (
        f"open {shared}/media: {shared} can be written by others than root; chmod go-w {shared}"
    )
    assert open_files() == before


def test_nothing_is_made_below_a_directory_that_others_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(UnsafePathError), paths.directory(tmp_path / "media", create=True):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_sticky_directory_may_be_written_by_others(tmp_path: Path) -> None:
    sticky = tmp_path / "sticky"
    (sticky / "media").mkdir(parents=True)
    sticky.chmod(0o1777)
    with paths.directory(sticky / "media") as here:
        assert os.path.samestat(os.fstat(here), (sticky / "media").stat())


def test_the_error_for_a_directory_that_may_not_be_opened_has_its_owner_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "caam").mkdir(mode=0o700)
    os.chown(tmp_path / "caam", 1000, -1)
    opens = os.open

    def without_the_right(path: object, *rest: object, **more: object) -> int:
        if path == "caam":
            raise PermissionError(13, "Permission denied")
        return opens(path, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "open", without_the_right)
    with pytest.raises(UnsafePathError) as refused, paths.directory(tmp_path / "caam"):
        pass
    assert str(refused.value) == (
        f"open {tmp_path}/caam: {tmp_path}/caam belongs to user 1000 with mode 0700, and cannot be "
        f"opened; chown root {tmp_path}/caam; chmod u+rx {tmp_path}/caam"
    )
