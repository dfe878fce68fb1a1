"""A board's udev rules are known to opt devices out, or not to, whenever they change."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from caam_hotplug.kernel import inotify, udev_rules
from caam_hotplug.kernel.udev_rules import OptOuts

OPTS_OUT = 'SUBSYSTEM=="block", ENV{CAAM_HOTPLUG}="0"\n'
SHIPPED = Path(__file__).parents[3] / "rules"


@pytest.fixture
def rules(tmp_path: Path) -> Path:
    """A directory of rules of which none sets the property."""
    directory = tmp_path / "etc/udev/rules.d"
    directory.mkdir(parents=True)
    (directory / "60-other.rules").write_text('KERNEL=="sda", SYMLINK+="disk"\n')
    return directory


@pytest.fixture
def opt_outs(rules: Path, tmp_path: Path) -> Iterator[OptOuts]:
    with closing(OptOuts((f"{tmp_path}/etc", f"{tmp_path}/run"))) as made:
        assert not made.may_be()
        yield made


def test_without_such_a_rule_none_may_be_there(opt_outs: OptOuts) -> None:
    assert not opt_outs.may_be()


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
    ],
)
def test_a_rule_that_sets_the_property_is_found(opt_outs: OptOuts, rules: Path, rule: str) -> None:
    (rules / "10-board.rules").write_text(f"# a board's own\n{rule}\n")
    assert opt_outs.may_be()


@pytest.mark.parametrize(
    "rule",
    [
        '# ENV{CAAM_HOTPLUG}="0"',
        'ENV{CAAM_HOTPLUG}=="0", TAG+="x"',
        'ENV{CAAM_HOTPLUG}!="0", TAG+="x"',
        'ENV{CAAM_HOTPLUG_X}="0"',
    ],
)
def test_a_rule_that_only_asks_for_it_does_not_count(
    opt_outs: OptOuts, rules: Path, rule: str
) -> None:
    (rules / "10-board.rules").write_text(f"{rule}\n")
    assert not opt_outs.may_be()


def test_the_rules_that_come_with_the_agent_opt_nothing_out() -> None:
    with closing(OptOuts((str(SHIPPED.parent),))) as opt_outs:
        opt_outs._directories = {SHIPPED}
        assert list(SHIPPED.glob("*.rules"))
        assert not opt_outs.may_be()


def test_a_directory_that_comes_later_is_looked_at(opt_outs: OptOuts, tmp_path: Path) -> None:
    later = tmp_path / "run/udev/rules.d"
    later.mkdir(parents=True)
    (later / "10-board.rules").write_text(OPTS_OUT)
    assert opt_outs.may_be()


def test_rules_that_have_not_changed_are_not_read_again(
    opt_outs: OptOuts, rules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    monkeypatch.setattr(udev_rules, "_sets", read.append)
    opt_outs.may_be()
    assert read == []
    (rules / "60-other.rules").write_text("# changed in its place\n")
    opt_outs.may_be()
    assert rules in read


def test_what_is_no_rule_file_does_not_count(opt_outs: OptOuts, rules: Path) -> None:
    (rules / "10-board.rules.bak").write_text(OPTS_OUT)
    assert not opt_outs.may_be()


def test_links_that_lead_nowhere_hide_no_rule(opt_outs: OptOuts, rules: Path) -> None:
    for number in range(40):
        (rules / f"{number:02}-gone.rules").symlink_to("/nonexistent")
    (rules / "20-board.rules").unlink(missing_ok=True)
    (rules / "20-board.rules").write_text(OPTS_OUT)
    assert opt_outs.may_be()


def test_a_rule_that_cannot_be_read_may_be_one(opt_outs: OptOuts, rules: Path) -> None:
    (rules / "10-board.rules").mkdir()
    assert opt_outs.may_be()


def test_rules_that_cannot_be_watched_may_always_have_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_path: Path) -> inotify.Directory:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(inotify, "Directory", refuse)
    with closing(OptOuts()) as opt_outs:
        assert opt_outs.may_be()


def test_what_happens_beside_a_missing_directory_is_no_news(tmp_path: Path) -> None:
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
    opt_outs = OptOuts((str(tmp_path),))
    opt_outs.may_be()
    assert len(os.listdir("/proc/self/fd")) > before
    opt_outs.close()
    assert len(os.listdir("/proc/self/fd")) == before
