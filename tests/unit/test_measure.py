"""The command line `measure`, copied to a board or run from a checkout."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from documented import PAGES, REPOSITORY, blocks
from measure import command_line

TOOL: Final = REPOSITORY / "tools" / "measure"
PROGRAM: Final = "python3 measure "


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """The directory as it is on a board, where no checkout is around it."""
    return Path(shutil.copytree(TOOL, tmp_path / "home" / "measure"))


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run it without the site's packages, among which caam_hotplug is where it is worked on."""
    command = [sys.executable, "-I", "-S", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["replug", "/dev/sda1"], ["throughput"]])
def test_where_the_package_is_not_installed_it_says_what_to_do(
    copied: Path, arguments: list[str]
) -> None:
    done = run(copied, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"measure {arguments[0]}: caam_hotplug cannot be imported: No module ")
    assert "; install caam-hotplug of this program's version" in line
    assert "or run it with PYTHONPATH=" in line


@pytest.mark.parametrize("command", [[], ["replug"], ["throughput"]])
def test_help_is_given_on_any_machine(copied: Path, command: list[str]) -> None:
    done = run(copied, *command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {' '.join(['measure', *command])} " in done.stdout
    assert "examples:" in done.stdout


def test_a_command_is_needed(copied: Path) -> None:
    done = run(copied)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: measure ")


def typed() -> set[str]:
    """Find what the help and the pages tell users to type after `python3 measure`."""
    in_help = {
        found[1]
        for text in (command_line.EXAMPLES, command_line.REPLUG_EXAMPLES,
                     command_line.THROUGHPUT_EXAMPLES)
        for found in re.finditer(r"python3 measure ((?:\S+ )*\S+)", text)
    }  # fmt: skip
    on_pages = {
        command.removeprefix(PROGRAM)
        for page in PAGES
        for block in blocks(page)
        for command in block.commands()
        if command.startswith(PROGRAM)
    }
    assert in_help and on_pages
    return in_help | on_pages


@pytest.mark.parametrize("command", sorted(typed()))
def test_an_example_has_the_options_that_there_are(command: str) -> None:
    words = shlex.split(command.partition(">")[0])
    try:
        command_line.parser().parse_args(words)
    except SystemExit as ended:
        assert ended.code == 0, command
