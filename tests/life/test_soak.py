"""A short run of the soak: `python -m life.soak` in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]


def test_two_thousand_cycles_with_faults_and_crashes_leave_nothing_and_grow_nothing() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "life.soak", "--cycles", "2000", "--seed", "1"],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent / 'agent'}{os.pathsep}{TESTS}"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("seed 1\n2000 cycles (the last 20 in threads), seed 1, ")
    assert run.stdout.endswith(" blocks of Python's), leaks 0\n")
    assert " 0 faults" not in run.stdout
