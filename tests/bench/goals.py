"""Goals for the agent's figures. A missed goal is reported; it is not a failure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from bench.figures import AGENT, BARE, COLUMNS, LIMIT, Report

Verdict = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Goal:
    """Upper bound of a median: in its column's unit, or as a ratio to another median."""

    column: str
    most: float
    to: tuple[str, str] | None = None
    """System and column that the ratio refers to."""
    system: str = AGENT
    title: str = ""
    """Name in messages, if it differs from the column's."""
    unit: str = ""
    """Unit, if it is neither the column's nor `x SYSTEM`."""

    def verdict(self, report: Report) -> Verdict | None:
        """Return whether it is met, and the value; None if this run cannot decide it."""
        value = median(report, self.system, self.column)
        base = 1.0 if self.to is None else median(report, *self.to)
        if value is None or not base:
            return None
        column = COLUMNS[self.column]
        value = value / column.divisor if self.to is None else value / base
        unit = self.unit or (column.unit if self.to is None else f"x {self.to[0]}")
        return {
            "title": self.title or column.title,
            "most": self.most,
            "unit": unit,
            "value": None if value == math.inf else value,
            "met": value <= self.most,
        }


def _to_limit(column: str, most: float) -> Goal:
    return Goal(column, most, (LIMIT, column))


GOALS: Final = (
    _to_limit("udev_add_to_mounted", 2),
    _to_limit("kernel_add_to_mounted", 0.6),
    _to_limit("removed_to_nothing_left", 1.5),
    _to_limit("own_cpu", 3),
    Goal("own_cpu", 0.1, ("U", "own_cpu")),
    Goal("rss_kib", 20),
    Goal("rss_kib", 17, system="nobus", title="RSS without D-Bus"),
    _to_limit("sticks_to_mounted", 1),
    _to_limit("disks_to_mounted", 1),
    Goal("last", 1.2, (AGENT, "first"), unit="x beside no other"),
    Goal("exec_to_ready", 1.15, (BARE, "exec_to_ready")),
    Goal("other_wake_ups", 0, title="idle wake-ups that are not the watchdog's"),
)


def median(report: Report, system: str, key: str) -> float | None:
    """Return a median of a system's column; infinite if it never came, None if not measured."""
    for systems in report["figures"].values():
        if key in systems.get(system, {}):
            found: float | None = systems[system][key]["median"]
            return math.inf if found is None else found
    return None


def with_verdicts(report: Report) -> Report:
    """Add to the report the verdicts of all goals that this run can decide."""
    verdicts = (goal.verdict(report) for goal in GOALS)
    return {**report, "goals": [verdict for verdict in verdicts if verdict is not None]}
