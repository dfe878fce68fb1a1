"""The wheel, installed by pip alone into an environment of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from install.tree import REPOSITORY, copied_to, files_below, version

BESIDE: Final = {
    "agent.schema.json",
    "agent.toml",
    "caam-hotplug.service",
    "caam-hotplug.socket",
    "drop-in.schema.json",
    "50-caam-hotplug.rules",
}
"""What the service needs besides its program, below share/caam-hotplug."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment into which the wheel was installed."""
    folder = tmp_path_factory.mktemp("wheel")
    tree, made = copied_to(folder / "tree"), folder / "environment"
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, tree], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", made], check=True)
    pip[0] = str(made / "bin/python")
    subprocess.run([*pip, "install", wheel], check=True)
    return made


def run(environment: Path, *arguments: str | Path) -> str:
    program = environment / "bin/caam-hotplug"
    done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    return done.stdout


def test_the_program_knows_its_version_and_reads_a_configuration(environment: Path) -> None:
    assert run(environment, "--version") == f"caam-hotplug {version()}\n"
    beside = environment / "share/caam-hotplug/agent.toml"
    assert "valid" in run(environment, "check", beside)


def test_what_the_service_needs_besides_lies_in_share(environment: Path) -> None:
    found = files_below(environment / "share/caam-hotplug")
    assert found >= BESIDE
    for name in found:
        (source,) = [*REPOSITORY.glob(f"config/{name}"), *REPOSITORY.glob(f"rules/{name}")]
        assert (environment / "share/caam-hotplug" / name).read_bytes() == source.read_bytes()
