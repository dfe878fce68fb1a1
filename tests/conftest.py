"""What concerns a whole run: a skipped test fails it, and two processes share its tests."""

from __future__ import annotations

import re
import sys
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from xdist.scheduler import LoadScopeScheduling

_MAINLINE: Final = re.compile(r"[\[-](trusted|encrypted|mainline)[\]-]")
"""In the name of a test for a board whose kernel is mainline's."""
_FIRST: Final = ("kernel", "agent, first half", "agent, second half")
"""Groups by their guests: the longest ones first, one for each of two processes."""
_HALF: Final = "test_f"
"""The tests of the installed agent are halved by the names of their modules."""

_tried: Final = pytest.StashKey[Counter[str]]()
"""How many combinations of the fault matrix, by what the fault does."""


def group_of(nodeid: str) -> str:
    """What runs in one process, one after the other: tests that share a guest, or a module."""
    file, _, test = nodeid.partition("::")
    match file.split("/"):
        case ["tests", "kernel", _]:
            return "kernel"
        case ["tests", "e2e", name]:
            if _MAINLINE.search(test):
                return "agent, mainline"
            return f"agent, {'first' if name < _HALF else 'second'} half"
    return file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """With several processes, each takes the next group when it is through with its own."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGuest(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    config.option.loadscopereorder = False
    return ByGuest(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With several processes the groups that take longest come first."""
    if hasattr(config, "workerinput"):
        rank = {group: place for place, group in enumerate(_FIRST)}
        items.sort(key=lambda item: rank.get(group_of(item.nodeid), len(rank)))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """One of several processes is through; what it counted counts here, unless it crashed."""
    counted = getattr(node, "workeroutput", {}).get("tried", {})
    node.config.stash.setdefault(_tried, Counter()).update(counted)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Turns a run with skipped tests into a failed one; what it tried is counted."""
    matrix = sys.modules.get("life.test_fault_matrix")
    if matrix is not None:
        session.config.stash.setdefault(_tried, Counter()).update(matrix.tried)
        getattr(session.config, "workeroutput", {})["tried"] = dict(matrix.tried)
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and reporter.stats.get("skipped") and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many combinations of the fault matrix have been tried."""
    tried = terminalreporter.config.stash.get(_tried, Counter())
    if tried:
        fails, hangs = tried["fails"], tried["hangs"]
        terminalreporter.write_line(
            f"fault matrix: {fails + hangs} combinations of moment, call and fault tried "
            f"({fails} failures, {hangs} hangs)"
        )
