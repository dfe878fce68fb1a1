"""Errors that a filesystem has counted are seen, or not known; what is not known is not none."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.errors import FlushError
from caam_hotplug.kernel import sysfs_tree
from caam_hotplug.kernel.mount_places import MountPlaces
from caam_hotplug.kernel.write_watch import WriteWatch
from caam_hotplug.model import DeviceNumber, Mapping

NOT_KNOWN = [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.EIO]
MAPPING = Mapping("caam-x", "CAAM-HOTPLUG-1-1", DeviceNumber(1, 3), (), 0)


def failing(number: int) -> Any:
    def fail(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> WriteWatch:
    monkeypatch.setattr(Mapping, "node", "/dev/null")
    monkeypatch.setattr(sysfs_tree, "text", lambda *_: "3\n")
    made = WriteWatch(MAPPING, tmp_path, MountPlaces(tmp_path))
    made.mounted()
    return made


def test_errors_that_were_counted_before_the_mount_are_no_lost_data(watch: WriteWatch) -> None:
    watch._look_at_ext4("/mnt")
    assert watch.lost == ""


@pytest.mark.parametrize("number", NOT_KNOWN)
def test_a_count_of_errors_that_cannot_be_read_is_not_known(
    watch: WriteWatch, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(sysfs_tree, "text", failing(number))
    for look in (watch.mounted, lambda: watch._look_at_ext4("/mnt")):
        with pytest.raises(FlushError, match=r"^look at the errors of null: "):
            look()
    assert watch.lost == ""
    watch._look_at_ext4("/mnt", is_last=True)
    assert "look at the errors of null" in watch.lost


def test_a_filesystem_that_counts_none_has_none(
    watch: WriteWatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysfs_tree, "text", failing(errno.ENOENT))
    watch._look_at_ext4("/mnt")
    assert watch.lost == ""
