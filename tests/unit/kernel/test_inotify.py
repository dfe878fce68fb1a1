from __future__ import annotations

import errno
import os
from contextlib import closing
from pathlib import Path

import pytest

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import inotify


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
