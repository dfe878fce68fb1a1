"""Whose files lie on a device is asked of the file, unless its filesystem may wait for a server."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import detached_files
from caam_hotplug.model import DeviceNumber

SELF: Final = Path("/proc/self")


def device_of(path: Path) -> DeviceNumber:
    device = path.stat().st_dev
    return DeviceNumber(os.major(device), os.minor(device))


def test_an_open_file_is_found_by_its_device(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        link = SELF / "fd" / str(file.fileno())
        there, elsewhere = {device_of(tmp_path)}, {DeviceNumber(4095, 7)}
        assert list(detached_files.linked(SELF, iter([link]), there)) == [link]
        assert list(detached_files.linked(SELF, iter([link]), elsewhere)) == []


def test_a_file_that_was_closed_meanwhile_is_no_error(tmp_path: Path) -> None:
    links = iter([SELF / "fd" / "99999"])
    assert list(detached_files.linked(SELF, links, {device_of(tmp_path)})) == []


def test_a_file_is_not_asked_where_its_filesystem_may_wait_for_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detached_files, "_ANSWERS_AT_ONCE", {"proc"})
    with (tmp_path / "file").open("wb") as file:
        links = iter([SELF / "fd" / str(file.fileno())])
        assert list(detached_files.linked(SELF, links, {device_of(tmp_path)})) == []


def test_a_file_in_memory_is_found_by_its_device(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(mmap.PAGESIZE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), mmap.PAGESIZE):
        line = next(
            line for line in (SELF / "maps").read_text().splitlines() if line.endswith(str(path))
        )
        number = DeviceNumber(*(int(part, 16) for part in line.split()[3].split(":")))
        assert str(path) in list(detached_files.mapped(SELF, {number}))
        assert list(detached_files.mapped(SELF, {DeviceNumber(4095, 7)})) == []
