"""A board's udev rules are known to opt devices out, or not to, whenever they change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from caam_hotplug.kernel import inotify, udev_rules
from caam_hotplug.kernel.udev_rules import UdevRules

OPTS_OUT = 'SUBSYSTEM=="block", ENV{CAAM_HOTPLUG}="0"\n'
SHIPPED = Path(__file__).parents[3] / "rules"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """Make a directory of rules that do not set the property."""
    directory = tmp_path / "etc/udev/rules.d"
    directory.mkdir(parents=True)
    (directory / "60-other.rules").write_text('KERNEL=="sda", SYMLINK+="disk"\n')
    return directory


@pytest.fixture
def watched(rules: Path, tmp_path: Path) -> Iterator[UdevRules]:
    with closing(UdevRules((f"{tmp_path}/etc", f"{tmp_path}/run"))) as made:
        assert not made.may_opt_out()
        yield made


def test_without_such_a_rule_none_may_be_there(watched: UdevRules) -> None:
    assert not watched.may_opt_out()


@pytest.mark.parametrize(
    "rule",
    [
        'ENV{CAAM_HOTPLUG}="0"',
        'ENV{CAAM_HOTPLUG}:="0"',
        'ENV{CAAM_HOTPLUG} = "$env{X}"',
        'KERNEL=="sda", \\\n  ENV{CAAM_HOTPLUG}="0"',
        'KERNEL=="sda",ENV{CAAM_HOTPLUG}="0", TAG+="x"',
        'ATTRS{model}=="Disk #1", ENV{CAAM_HOTPLUG}="0"',
        'ENV{CAAM_HOTPLUG}+="0"',
        'ENV{CAAM_HOTPLUG}=e"0"',
        'ENV{CAAM_HOTPLUG} \\\n = "0"',
        'IMPORT{cmdline}="CAAM_HOTPLUG"',
        'IMPORT{program}="/usr/bin/board-id $devnode"',
        'IMPORT{program}=="board-id"',
        'SUBSYSTEM=="block", IMPORT{program}="/bin/sh -c \'scsi_id; echo X\'"',
        'IMPORT{file}="/etc/board"',
        'IMPORT="board-id"',
        'ENV{DEVTYPE}=="partition", IMPORT{parent}="CAAM*"',
        'SUBSYSTEMS=="usb", IMPORT{builtin}="hwdb --subsystem=usb"',
        'KERNEL=="sd*|sr*", IMPORT{builtin}="hwdb board:%k"',
        'KERNEL!="sr*", IMPORT{file}="/etc/board"',
        'ENV{ID_FS_TYPE}=="", IMPORT{program}="board-id"',
        'SUBSYSTEM!="net|block", GOTO="end"\nIMPORT{program}="board-id"\nLABEL="end"',
        'ACTION=="remove", GOTO="end"\nIMPORT{program}="board-id"\nLABEL="end"',
        'TEST=="x", GOTO="end"\nIMPORT{program}="board-id"\nLABEL="end"',
        'SUBSYSTEM!="block", GOTO="a"\nLABEL="a"\nIMPORT{program}="board-id"',
    ],
)
def test_a_rule_that_sets_the_property_or_may_is_found(
    watched: UdevRules, rules: Path, rule: str
) -> None:
    (rules / "10-board.rules").write_text(f"# a board's own\n{rule}\n")
    assert watched.may_opt_out()


@pytest.mark.parametrize(
    "rule",
    [
        '# ENV{CAAM_HOTPLUG}="0"',
        'ENV{CAAM_HOTPLUG}=="0", TAG+="x"',
        'ENV{CAAM_HOTPLUG}!="0", TAG+="x"',
        'ENV{CAAM_HOTPLUG_X}="0"',
        '# IMPORT{program}="board-id"',
        'SUBSYSTEM=="net", IMPORT{program}="board-id"',
        'ACTION=="remove", IMPORT{program}="board-id"',
        'SUBSYSTEM!="net", GOTO="end"\nIMPORT{program}="board-id"\nLABEL="end"',
        'KERNEL!="dm-[0-9]*|md*", GOTO="end"\nIMPORT{file}="/etc/board"\nLABEL="end"',
        'ENV{MODALIAS}!="", IMPORT{builtin}="hwdb --subsystem=$env{SUBSYSTEM}"',
        'KERNEL=="sd*", IMPORT{program}="scsi_id --export --whitelisted -d $devnode"',
        'IMPORT{program}="/sbin/mdadm --incremental --export $devnode"',
        'IMPORT{builtin}="blkid", IMPORT{builtin}="path_id", IMPORT{parent}="ID_*"',
        'RUN{program}+="/usr/bin/mount-it", PROGRAM="/usr/bin/board-id"',
    ],
)
def test_a_rule_that_does_not_set_it_does_not_count(
    watched: UdevRules, rules: Path, rule: str
) -> None:
    (rules / "10-board.rules").write_text(f"{rule}\n")
    assert not watched.may_opt_out()


def test_the_rules_that_come_with_the_agent_opt_nothing_out() -> None:
    with closing(UdevRules((str(SHIPPED.parent),))) as watched:
        watched._directories = {SHIPPED}
        assert list(SHIPPED.glob("*.rules"))
        assert not watched.may_opt_out()


def test_a_directory_that_is_created_later_is_read(watched: UdevRules, tmp_path: Path) -> None:
    later = tmp_path / "run/udev/rules.d"
    later.mkdir(parents=True)
    (later / "10-board.rules").write_text(OPTS_OUT)
    assert watched.may_opt_out()


def test_rules_that_have_not_changed_are_not_read_again(
    watched: UdevRules, rules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(udev_rules, "_sets", read.append)
    watched.may_opt_out()
    assert read == []
    (rules / "60-other.rules").write_text("# changed in its place\n")
    watched.may_opt_out()
    assert rules in read


def test_what_is_no_rule_file_does_not_count(watched: UdevRules, rules: Path) -> None:
    (rules / "10-board.rules.bak").write_text(OPTS_OUT)
    assert not watched.may_opt_out()


def test_dangling_links_hide_no_rule(watched: UdevRules, rules: Path) -> None:
    for number in range(40):
        (rules / f"{number:02}-gone.rules").symlink_to("/nonexistent")
    (rules / "20-board.rules").unlink(missing_ok=True)
    (rules / "20-board.rules").write_text(OPTS_OUT)
    assert watched.may_opt_out()


def test_a_rule_that_cannot_be_read_may_be_one(watched: UdevRules, rules: Path) -> None:
    (rules / "10-board.rules").mkdir()
    assert watched.may_opt_out()


def test_rules_that_cannot_be_watched_may_always_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> inotify.Directory:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(inotify, "Directory", refuse)
    with closing(UdevRules()) as watched:
        assert watched.may_opt_out()


def test_a_file_beside_a_missing_directory_is_no_change(tmp_path: Path) -> None:
    missing = tmp_path / "udev/rules.d"
    missing.parent.mkdir()
    with closing(inotify.Directory(missing)) as directory:
        (missing.parent / "queue").touch()
        assert directory.read() == []
        missing.mkdir()
        assert directory.read() == [None]
        (missing / "a.rules").touch()
        assert directory.read()


def test_nothing_is_open_afterwards(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    (tmp_path / "udev/rules.d").mkdir(parents=True)
    watched = UdevRules((str(tmp_path),))
    watched.may_opt_out()
    assert len(os.listdir("/proc/self/fd")) > before
    watched.close()
    assert len(os.listdir("/proc/self/fd")) == before
