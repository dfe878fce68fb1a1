"""A bench for every test, with the proof that nothing of the agent's is left on it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from fakes.bench import Bench


@pytest.fixture
def bench() -> Iterator[Bench]:
    """A bench with a running agent; afterwards all media are pulled and nothing may be left."""
    bench = Bench()
    bench.start()
    yield bench
    if bench.running:
        for name in list(bench.kernel.media):
            bench.yank(name)
        bench.settle()
        bench.stop()
    bench.kernel.let_go()
    left = bench.kernel.leftovers()
    bench.close()
    assert left == []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many combinations of the fault matrix have been tried."""
    matrix = sys.modules.get("life.test_fault_matrix")
    if matrix is not None and matrix.tried:
        fails, hangs = matrix.tried["fails"], matrix.tried["hangs"]
        terminalreporter.write_line(
            f"fault matrix: {fails + hangs} combinations of moment, call and fault tried "
            f"({fails} failures, {hangs} hangs)"
        )
