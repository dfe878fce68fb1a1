"""Who may have written a configuration that root acts on: root alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from caam_hotplug.config import loader
from caam_hotplug.errors import ConfigError, UnfitFileError, UnsafePathError
from caam_hotplug.kernel.config_files import AnyonesFiles, RootsFiles

OTHER_USER = 54321


@pytest.fixture
def folder(roots_folder: Path) -> Path:
    """Make the configuration's directory, with a file and a drop-in."""
    folder = roots_folder / "etc"
    (folder / "rules.d").mkdir(parents=True)
    (folder / "agent.toml").write_text('log_level = "debug"\n')
    (folder / "rules.d" / "a.toml").write_text('[[rule]]\nname = "a"\n')
    return folder


def refusals(folder: Path) -> list[str]:
    """Return the faults of the configuration as one to act on."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError) as caught:
        loader.load(folder / "agent.toml", RootsFiles())
    assert len(os.listdir("/proc/self/fd")) == before
    # Who only inspects it may read it all the same.
    assert loader.load(folder / "agent.toml", AnyonesFiles()).log_level == "debug"
    return [str(fault) for fault in caught.value.faults]


def owned_by_other_user(component: Path) -> str:
    return (
        f"{component}: belongs to user {OTHER_USER}, not to root, and who can change the "
        f"configuration controls the agent: chown root {component}"
    )


def writable(component: Path) -> str:
    return (
        f"{component}: can be written by others than root, and who can change the "
        f"configuration controls the agent: chmod go-w {component}"
    )


PARTS = [".", "etc", "etc/agent.toml", "etc/rules.d", "etc/rules.d/a.toml"]


def test_what_only_root_can_have_written_is_read(folder: Path) -> None:
    read = loader.load(folder / "agent.toml", RootsFiles())
    assert (read.log_level, [rule.name for rule in read.rule]) == ("debug", ["a"])


@pytest.mark.parametrize("part", PARTS)
def test_a_component_of_another_user_refuses_the_configuration(folder: Path, part: str) -> None:
    component = folder.parent / part
    os.chown(component, OTHER_USER, 0)
    assert refusals(folder) == [owned_by_other_user(component)]


@pytest.mark.parametrize("others", [0o020, 0o002])
@pytest.mark.parametrize("part", PARTS)
def test_a_component_that_others_may_write_refuses_the_configuration(
    folder: Path, part: str, others: int
) -> None:
    component = folder.parent / part
    component.chmod(component.stat().st_mode | others)
    assert refusals(folder) == [writable(component)]


@pytest.mark.parametrize("part", [".", "etc", "etc/rules.d"])
def test_a_sticky_directory_is_one_that_others_may_write(folder: Path, part: str) -> None:
    component = folder.parent / part
    component.chmod(0o1777)
    assert refusals(folder) == [
        f"{component}: is a place where everyone may put files, sticky as it is, and who can "
        "change the configuration controls the agent: choose one where only root may"
    ]


def test_a_place_below_tmp_is_no_place_for_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('log_level = "debug"\n')
    with pytest.raises(UnsafePathError) as caught:
        RootsFiles().read(tmp_path / "agent.toml")
    assert caught.value.component == Path("/tmp")


@pytest.mark.parametrize("part", PARTS[2:])
def test_a_link_refuses_the_configuration_wherever_it_leads(folder: Path, part: str) -> None:
    component = folder.parent / part
    component.rename(component.with_suffix(".real"))
    component.symlink_to(component.with_suffix(".real"))
    (fault,) = refusals(folder)
    assert fault.startswith(f"{component}: is ")
    assert " link" in fault


def test_a_link_above_the_configuration_refuses_it(folder: Path) -> None:
    (folder.parent / "link").symlink_to("etc")
    assert refusals(folder.parent / "link") == [
        f"{folder.parent}/link: is not a directory but a link or a file, and who can change the "
        "configuration controls the agent: name a path without links"
    ]


def test_every_wrong_component_is_reported_once(folder: Path) -> None:
    os.chown(folder / "agent.toml", OTHER_USER, 0)
    (folder / "rules.d").chmod(0o777)
    assert refusals(folder) == [
        owned_by_other_user(folder / "agent.toml"),
        writable(folder / "rules.d"),
    ]


def test_a_relative_path_is_walked_from_the_root(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    assert RootsFiles().read(Path("agent.toml")) == b'log_level = "debug"\n'
    os.chown(folder.parent, OTHER_USER, 0)
    with pytest.raises(UnsafePathError, match=f"{folder.parent} belongs to user {OTHER_USER}"):
        RootsFiles().read(Path("agent.toml"))


def test_a_fifo_of_roots_is_not_waited_for(folder: Path) -> None:
    (folder / "agent.toml").unlink()
    os.mkfifo(folder / "agent.toml")
    with pytest.raises(UnfitFileError, match="is not a regular file"):
        RootsFiles().read(folder / "agent.toml")


def test_drop_ins_that_are_not_there_are_none(folder: Path) -> None:
    for reader in (AnyonesFiles(), RootsFiles()):
        assert reader.names(folder / "no" / "such") == []
        assert reader.names(folder / "rules.d") == ["a.toml"]
