"""`make install` and `make uninstall`, into a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from install.tree import AGENT, REPOSITORY, copied_to, files_below, version

HOME: Final = "usr/lib/caam-hotplug"
CONFIGURATION: Final = "etc/caam-hotplug/agent.toml"
SCHEMA: Final = "agent.schema.json"
PLACES: Final = {
    "config/program": "usr/bin/caam-hotplug",
    "config/agent.toml": "usr/share/caam-hotplug/agent.toml",
    "config/agent.schema.json": "usr/share/caam-hotplug/agent.schema.json",
    "config/drop-in.schema.json": "usr/share/caam-hotplug/drop-in.schema.json",
    "config/caam-hotplug-holders.socket": "usr/lib/systemd/system/caam-hotplug-holders.socket",
    "config/caam-hotplug-holders@.service": "usr/lib/systemd/system/caam-hotplug-holders@.service",
    "config/caam-hotplug-sleep.service": "usr/lib/systemd/system/caam-hotplug-sleep.service",
    "config/caam-hotplug.service": "usr/lib/systemd/system/caam-hotplug.service",
    "config/caam-hotplug.socket": "usr/lib/systemd/system/caam-hotplug.socket",
    "config/sysusers.conf": "usr/lib/sysusers.d/caam-hotplug.conf",
    "config/org.caamhotplug1.conf": "usr/share/dbus-1/system.d/org.caamhotplug1.conf",
    "config/org.caamhotplug1.xml": "usr/share/dbus-1/interfaces/org.caamhotplug1.xml",
    "config/completions/_caam-hotplug": "usr/share/zsh/site-functions/_caam-hotplug",
    "config/completions/caam-hotplug.bash": "usr/share/bash-completion/completions/caam-hotplug",
    "config/completions/caam-hotplug.fish": "usr/share/fish/vendor_completions.d/caam-hotplug.fish",
    "docs/man/caam-hotplug.1": "usr/share/man/man1/caam-hotplug.1",
    "docs/man/caam-hotplug.toml.5": "usr/share/man/man5/caam-hotplug.toml.5",
    "docs/man/caam-hotplugd.8": "usr/share/man/man8/caam-hotplugd.8",
    "rules/50-caam-hotplug.rules": "usr/lib/udev/rules.d/50-caam-hotplug.rules",
}
"""Where each file goes that is not part of the Python package. Not each has to be there."""
NOT_INSTALLED: Final = {"config/install.mk"}


def make(target: str, stage: Path, *variables: str, tree: Path = REPOSITORY) -> None:
    subprocess.run(["make", "-s", "-C", tree, target, f"DESTDIR={stage}", *variables], check=True)


def package() -> set[str]:
    """The Python package's files, where they are installed."""
    found = (path for path in AGENT.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {f"{HOME}/caam_hotplug/{path.relative_to(AGENT)}" for path in found}


def test_what_is_installed_is_the_package_and_every_file_that_is_for_users(tmp_path: Path) -> None:
    make("install", tmp_path)
    there = {place for source, place in PLACES.items() if (REPOSITORY / source).exists()}
    assert files_below(tmp_path) == package() | there | {CONFIGURATION}


def test_every_file_of_the_configuration_and_the_manual_has_a_place() -> None:
    of_other_builds = ("config/debian/", "config/yocto/")
    found = {
        f"{folder}/{name}"
        for folder in ("config", "rules", "docs/man")
        for name in files_below(REPOSITORY / folder)
    }
    known = PLACES.keys() | NOT_INSTALLED
    assert {name for name in found - known if not name.startswith(of_other_builds)} == set()


def test_programs_are_for_all_to_run_and_nothing_is_for_others_to_write(tmp_path: Path) -> None:
    make("install", tmp_path)
    modes = {name: (tmp_path / name).stat().st_mode & 0o777 for name in files_below(tmp_path)}
    assert modes.pop("usr/bin/caam-hotplug") == 0o755
    assert set(modes.values()) == {0o644}


def test_the_program_runs_the_package_that_was_installed_with_it(tmp_path: Path) -> None:
    make("install", tmp_path)
    (tmp_path / HOME / "caam_hotplug/__init__.py").write_text('__version__ = "of this place"\n')
    command = [sys.executable, "-I", tmp_path / "usr/bin/caam-hotplug"]
    said = subprocess.run([*command, "--version"], check=True, capture_output=True, text=True)
    assert said.stdout == "caam-hotplug of this place\n"
    subprocess.run([*command, "check", tmp_path / CONFIGURATION], check=True, capture_output=True)


def test_what_the_program_imports_is_not_the_environments_choice() -> None:
    assert (REPOSITORY / "config/program").read_text().startswith("#!/usr/bin/python3 -I\n")


def test_under_another_prefix_what_is_installed_names_the_files_there(tmp_path: Path) -> None:
    make("install", tmp_path, "PREFIX=/usr/local")
    assert (tmp_path / "usr/local/bin/caam-hotplug").exists()
    schema = f"#:schema /usr/local/share/caam-hotplug/{SCHEMA}\n"
    for file in ("usr/local/share/caam-hotplug/agent.toml", CONFIGURATION):
        assert (tmp_path / file).read_text().startswith(schema)
    assert (tmp_path / "usr/local/share/caam-hotplug" / SCHEMA).exists()
    unit = (tmp_path / "usr/local/lib/systemd/system/caam-hotplug.service").read_text()
    assert "ExecStart=/usr/local/bin/caam-hotplug run" in unit
    assert "/usr/bin/" not in unit


READ_BY_OTHERS: Final = {
    "/usr": ("usr/lib", "usr/share"),
    "/usr/local": ("usr/local/lib", "etc"),
    "/opt/caam": ("etc", "etc"),
}
"""Where systemd and udevd, and dbus-daemon, look for what is installed below such a prefix."""


@pytest.mark.parametrize("prefix", READ_BY_OTHERS)
def test_what_others_read_is_where_they_look_for_it(tmp_path: Path, prefix: str) -> None:
    make("install", tmp_path, f"PREFIX={prefix}")
    system, bus = READ_BY_OTHERS[prefix]
    assert files_below(tmp_path) >= {
        f"{system}/systemd/system/caam-hotplug.service",
        f"{system}/systemd/system/caam-hotplug.socket",
        f"{system}/sysusers.d/caam-hotplug.conf",
        f"{system}/udev/rules.d/50-caam-hotplug.rules",
        f"{bus}/dbus-1/system.d/org.caamhotplug1.conf",
    }
    make("uninstall", tmp_path, f"PREFIX={prefix}")
    assert files_below(tmp_path) == {CONFIGURATION}


def test_an_installation_leaves_a_configuration_alone(tmp_path: Path) -> None:
    (tmp_path / CONFIGURATION).parent.mkdir(parents=True)
    (tmp_path / CONFIGURATION).write_text("mine")
    make("install", tmp_path)
    assert (tmp_path / CONFIGURATION).read_text() == "mine"


def test_a_module_that_the_new_version_has_not_is_gone_after_an_installation(
    tmp_path: Path,
) -> None:
    stage = tmp_path / "stage"
    tree = copied_to(tmp_path / "tree")
    (tree / "agent/caam_hotplug/earlier.py").write_text("")
    make("install", stage, tree=tree)
    make("install", stage)
    assert not (stage / HOME / "caam_hotplug/earlier.py").exists()


def test_only_the_configuration_stays_after_an_uninstallation(tmp_path: Path) -> None:
    make("install", tmp_path, f"COMPILE_WITH={sys.executable}")
    assert any(name.endswith(".pyc") for name in files_below(tmp_path))
    make("uninstall", tmp_path)
    assert files_below(tmp_path) == {CONFIGURATION}


def test_all_that_name_a_version_name_the_programs() -> None:
    named = f'version = "{version()}"'
    assert named in (REPOSITORY / "pyproject.toml").read_text().splitlines()
    changelog = (REPOSITORY / "config/debian/changelog").read_text()
    assert changelog.startswith(f"caam-hotplug ({version()}) ")
    recipe = f"config/yocto/recipes-core/caam-hotplug/caam-hotplug_{version()}.bb"
    assert (REPOSITORY / recipe).exists()
