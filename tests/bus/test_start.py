"""Commands start fast since they import little, and so does the service."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bus.private import REPOSITORY

NOT_FOR_STATUS = {
    "pyudev", "tomllib", "ctypes", "rich", "caam_hotplug.config", "caam_hotplug.kernel",
    "caam_hotplug.volume", "caam_hotplug.daemon", "caam_hotplug.dbus.service",
}  # fmt: skip
NOT_FOR_HELP = NOT_FOR_STATUS | {"asyncio", "sdbus", "json"}
NOT_FOR_THE_AGENT = {
    "_ssl", "argparse", "bz2", "decimal", "difflib", "gettext", "lzma", "shutil", "tempfile",
    "uuid", "caam_hotplug.cli.keys", "caam_hotplug.cli.migrate", "caam_hotplug.cli.provision",
    "caam_hotplug.cli.agent_commands", "caam_hotplug.dbus.client",
}  # fmt: skip


def imported(script: str, *arguments: str) -> set[str]:
    """Return the modules that are loaded after the script."""
    script += "\nimport sys; print(*sys.modules, sep='\\n', file=sys.stderr)"
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env={
            "PYTHONPATH": str(REPOSITORY / "agent"),
            "DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere",
        },
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stderr.splitlines())


def test_status_imports_no_module_that_only_the_agent_needs() -> None:
    after = imported(
        "from caam_hotplug.cli import listing\nfrom caam_hotplug.cli.main import main\n"
        "assert main(['status']) == 3"
    )
    assert "caam_hotplug.dbus.client" in after
    assert after & NOT_FOR_STATUS == set()


@pytest.mark.parametrize("arguments", [["--help"], ["eject", "--help"], ["--version"]], ids=str)
def test_help_imports_neither_the_bus_nor_a_loop(arguments: list[str]) -> None:
    after = imported(
        "import sys\nfrom caam_hotplug.cli.main import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass",
        *arguments,
    )
    assert after & NOT_FOR_HELP == set()


def test_the_agent_imports_no_module_that_only_commands_need() -> None:
    after = imported(
        "from caam_hotplug.cli import lean_imports, main as cli\nlean_imports.leave_out()\n"
        "from caam_hotplug.dbus import objects\n"
        "from caam_hotplug.daemon import main as daemon\ndaemon.run = lambda load: load()\n"
        "assert cli.main(['run']) == 0"
    )
    assert {
        "caam_hotplug.config.loader",
        "caam_hotplug.volume.lifecycle",
        "pyudev",
        "sdbus",
    } <= after
    assert after & NOT_FOR_THE_AGENT == set()


def test_the_agent_without_a_bus_has_not_imported_sdbus() -> None:
    after = imported("import caam_hotplug.dbus.service")
    assert "sdbus" not in after


def test_the_benchmark_of_the_start_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "benchmark.py"), "--json", "--times", "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout).keys() == {"status_ratio", "sdbus_ms", "sdbus_kib"}
