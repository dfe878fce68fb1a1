"""Print at the end of a run how many inputs were tried."""

from __future__ import annotations

import pytest

from fuzz.inputs import PROFILE, TRIED


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """End a hanging run with the stack of where it hangs.

    A signal would not do: Hypothesis takes the exception of its handler for a failure of the test,
    and tries the hanging input once more.
    """
    for item in items:
        if "fuzz" in item.path.parts:
            seconds = 7200 if PROFILE == "many" else 300
            item.add_marker(pytest.mark.timeout(seconds, method="thread"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the figures that docs/reliability.md quotes."""
    if not TRIED.total():
        return
    terminalreporter.section("inputs tried")
    for target, count in sorted(TRIED.items()):
        terminalreporter.write_line(f"{count:>10,}  {target}")
    terminalreporter.write_line(f"{TRIED.total():>10,}  in all")
