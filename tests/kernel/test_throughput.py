"""`measure throughput`, run as on a board; its figures are not asserted."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from caam_hotplug import names
from caam_hotplug.kernel import devmapper
from fakes.contract import until
from kernel.witness import PARAMETERS, Board, run
from measure.throughput.report import table
from measure.throughput.rows import COLUMNS, FLAGS, SECTOR_SIZES

PROGRAM: Final = ("/src/tools/measure", "throughput")
QUICK: Final = ("--rounds", "1", "--size", "1", "--reads", "2")
ENDLESS: Final = ("--rounds", "1000000", "--size", "1", "--reads", "2")
NOBODY: Final = 65534

pytestmark = pytest.mark.usefixtures("udev_rule", "nothing_left")


@pytest.fixture(scope="module")
def both() -> Iterator[None]:
    """Give the kernel tagged keys and trusted ones; restore NXP's afterwards."""
    chip = (PARAMETERS / "otpmk").read_text().strip()
    run("board-kernel", "both", chip)
    yield
    run("board-kernel", "nxp", chip)


def measured(*options: str, user: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    command = [sys.executable, *PROGRAM, *options]
    return subprocess.run(command, capture_output=True, text=True, user=user, timeout=300)


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line of its error output."""
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    return line


def mappings() -> list[str]:
    """Return the mappings of all measurements."""
    return [mapping.name for mapping in devmapper.ours(names.BENCH.uuid)]


def test_a_user_other_than_root_is_refused_in_a_line() -> None:
    assert refusal(measured(*QUICK, user=NOBODY)) == (
        "measure throughput: only root can create mappings; run it with sudo"
    )


def test_a_volume_that_is_too_large_for_the_memory_is_not_made() -> None:
    line = refusal(measured("--size", "100000"))
    assert line.startswith("measure throughput: a volume of 100000 MiB does not fit into memory")
    assert "; use --size " in line


def test_without_a_seal_method_the_refusal_names_what_each_lacks() -> None:
    board = Board()
    board.power_off()
    try:
        line = refusal(measured(*QUICK))
    finally:
        board.restore()
    assert line.startswith("measure throughput: this kernel can seal no key; tagged: open")
    assert "trusted: make trusted key " in line
    assert line.endswith("`caam-hotplug doctor` says what is missing")


def test_a_kernel_with_one_kind_of_keys_is_measured_with_that_kind(tmp_path: Path) -> None:
    output = tmp_path / "output"
    with output.open("w") as file, started(file) as process:
        until(lambda: "warming up" in output.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
    left_out, *_ = output.read_text().splitlines()
    assert left_out.startswith("measure throughput: trusted keys are left out: make trusted key ")
    assert "it needs CONFIG_TRUSTED_KEYS" in left_out


def test_every_combination_has_figures_in_one_run(both: None) -> None:
    done = measured(*QUICK, "--json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "warming up\nround 1 of 1\n"
    report = json.loads(done.stdout)
    bare, *rows = report["rows"]
    kinds = ("software", "tagged", "trusted")
    assert bare["key"] == "bare"
    assert [(row["key"], row["sector_size"], tuple(row["flags"])) for row in rows] == list(
        itertools.product(kinds, SECTOR_SIZES, FLAGS)
    )
    for row, column in itertools.product(report["rows"], COLUMNS):
        assert 0 < row[column]["min"] <= row[column]["median"] <= row[column]["max"], row
    assert [rows[0][column]["ratio"] for column in COLUMNS] == [1, 1, 1]
    drivers = {row["key"]: row["driver"] for row in rows}
    assert drivers["tagged"] == "tk-cbc-aes-caam"
    assert "caam" not in drivers["software"]
    assert drivers["trusted"].startswith("xts")
    assert report["left_out"] == {}
    assert len(table(report).splitlines()) == 3 + 3 * len(kinds) + 3 + len(report["rows"])


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_an_interrupted_run_leaves_nothing_and_removes_the_mappings_of_a_killed_run(
    number: signal.Signals, status: int, tmp_path: Path
) -> None:
    (left,) = killed()
    output = tmp_path / "output"
    with output.open("w") as file, started(file) as process:
        until(lambda: len(set(mappings()) - {left}) == 1)
        process.send_signal(number)
        assert process.wait(120) == status
    first, *_ = output.read_text().splitlines()
    assert first == f"measure throughput: a killed run had left {left}; removed"
    assert mappings() == []


def started(file: Any) -> subprocess.Popen[bytes]:
    """Start the program, and end it afterwards."""
    return subprocess.Popen(
        [sys.executable, *PROGRAM, *ENDLESS], stdout=subprocess.DEVNULL, stderr=file
    )


def killed() -> list[str]:
    """Kill a run while it has a mapping; return the mappings that it leaves."""
    found: list[str] = []
    while not found:  # a call that removes the last one is not interrupted by the stop
        with started(subprocess.DEVNULL) as process:

            def is_held_with_a_mapping(process: subprocess.Popen[bytes] = process) -> bool:
                process.send_signal(signal.SIGSTOP)
                if not mappings():
                    process.send_signal(signal.SIGCONT)
                return bool(mappings())

            until(is_held_with_a_mapping)
            process.kill()
        found = mappings()
    return found
