"""Checks of the agent itself."""

from __future__ import annotations

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import MountSettings, Rule
from caam_hotplug.config.templates import PathTemplate
from caam_hotplug.doctor import runner, service
from caam_hotplug.doctor.board import Board, is_open_to_service
from caam_hotplug.doctor.result import Status, unknown
from unit.doctor.boards import BoardFiles


@pytest.mark.parametrize(
    ("owner", "group", "mode", "wanted", "open_to_it"),
    [(0, 0, 0o600, 6, True), (0, 0, 0o400, 6, False), (1000, 0, 0o640, 4, True),
     (1000, 1000, 0o660, 6, False), (1000, 1000, 0o604, 4, True), (0, 1000, 0o066, 6, False)],
)  # fmt: skip
def test_the_service_is_a_root_that_modes_hold_for(
    owner: int, group: int, mode: int, wanted: int, open_to_it: bool, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.touch()
    os.chown(file, owner, group)
    file.chmod(mode)
    assert is_open_to_service(file.stat(), wanted) == open_to_it


def test_blob_directory_and_blobs_of_a_board_without_caam(roots_folder: Path) -> None:
    board = BoardFiles(roots_folder)
    assert board.status(service.blob_directory) is Status.FAILURE
    assert board.status(service.blobs) is Status.UNKNOWN
    folder = board.root / "data/caam"
    folder.mkdir(parents=True, mode=0o700)
    assert board.status(service.blob_directory) is Status.OK
    assert board.status(service.blobs) is Status.WARNING
    blob = struct.pack("=5I", 0x5461674F, 0, 1, 16, 76) + bytes(76)
    board.has("/data/caam/a.bb", blob)
    (fine,) = board.seen(service.blobs)
    assert fine.found.endswith("whether this CAAM takes them was not tried, for want of it")
    board.has("/data/caam/b.bb", blob[:-1])
    damaged, rest = board.seen(service.blobs)
    assert "b.bb" in damaged.found
    assert "is cut short" in damaged.found
    assert rest.found.startswith("1 of 2 in ")
    os.chown(folder, 1000, 1000)
    (refused,) = board.seen(service.blob_directory)
    assert refused.remedy == f"chown root {folder}"
    assert board.seen(service.blobs)[0].status is Status.UNKNOWN


def test_a_mount_root_that_others_may_change_is_refused(roots_folder: Path) -> None:
    board = BoardFiles(roots_folder)
    assert board.status(service.mount_root) is Status.OK
    root = board.root / "run/media"
    root.mkdir(parents=True)
    assert board.status(service.mount_root) is Status.OK
    root.chmod(0o777)
    assert board.status(service.mount_root) is Status.FAILURE


def test_a_rules_path_below_a_directory_that_others_may_change_is_refused(
    roots_folder: Path,
) -> None:
    board, settings = BoardFiles(roots_folder), MountSettings(path=PathTemplate("/srv/recorder"))
    config = Config(rule=(Rule(name="r", mount=settings),))
    missing = board.seen(service.mount_root, config)[1]
    assert (missing.status, missing.remedy) == (Status.WARNING, "mkdir -p /srv")
    above = board.root / "srv"
    above.mkdir()
    assert [v.status for v in board.seen(service.mount_root, config)] == [Status.OK, Status.OK]
    above.chmod(0o1777)
    refused = board.seen(service.mount_root, config)[1]
    assert (refused.status, refused.remedy) == (
        Status.FAILURE, "choose one where only root may",
    )  # fmt: skip


def test_every_fault_of_the_configuration_is_a_line(roots_folder: Path) -> None:
    file = roots_folder / "agent.toml"
    board = Board(Config(), config_file=file)
    assert [v.status for v in service.configuration(board)] == [Status.OK]
    file.write_text('log_level = "loud"\nmount_rot = "/media"\n')
    faults = list(service.configuration(board))
    assert [v.status for v in faults] == [Status.FAILURE] * 2
    assert f"{file}: mount_rot: is not a key here" in faults[1].found


def test_with_a_faulty_configuration_nothing_is_said_of_what_it_configures(
    roots_folder: Path,
) -> None:
    file = roots_folder / "agent.toml"
    file.write_text('blob_directory = "/srv/keys"\nmount_rot = "/media"\n')
    board = replace(runner._board(file), root=roots_folder)
    verdicts = [(f.check, f.verdict) for f in runner.results(board)]
    unreadable = unknown("the configuration cannot be read, see its line")
    not_checked = {check for check, verdict in verdicts if verdict == unreadable}
    assert not_checked == {
        "ciphers", "blob-directory", "blobs", "mount-root", "udevd", "udev-rule",
        "mount-propagation", "fixed-tables",
    }  # fmt: skip
    assert [check for check, v in verdicts if "/data/caam" in f"{v.found}{v.remedy}"] == []
    assert "configuration" in {check for check, v in verdicts if v.status is Status.FAILURE}


def test_a_configuration_that_was_named_must_be_there(roots_folder: Path) -> None:
    board = Board(Config(), config_file=roots_folder / "no.toml", config_required=True)
    assert [v.status for v in service.configuration(board)] == [Status.FAILURE]


def test_where_systemd_does_not_answer_the_service_is_unknown(board: BoardFiles) -> None:
    assert board.status(service.service) is Status.UNKNOWN
    assert board.status(service.sockets) is Status.UNKNOWN
