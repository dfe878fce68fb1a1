"""Says at the end of a run how many inputs were tried."""

from __future__ import annotations

import pytest

from fuzz.inputs import PROFILE, TRIED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A hang ends the run with a look at where it hangs.

    A signal would not do: Hypothesis takes what its handler raises for a failure of the test, and
    tries the input that hangs once more.
    """
    for item in items:
        if "fuzz" in item.path.parts:
            seconds = 7200 if PROFILE == "many" else 300
            item.add_marker(pytest.mark.timeout(seconds, method="thread"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures that docs/reliability.md quotes."""
    if not TRIED.total():
        return
    terminalreporter.section("inputs tried")
    for target, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:>10,}  {target}")
    terminalreporter.write_line(f"{TRIED.total():>10,}  in all")
