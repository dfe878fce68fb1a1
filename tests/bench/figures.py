"""Figures of the measurements: medians, percentiles, and ratios to a system of the same run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

LIMIT: Final = "L"
AGENT: Final = "agent"
BARE: Final = "bare"

Figure = dict[str, Any]
"""Median, 95th percentile, least, most, and ratio to the base's median; None for never or none."""

Report = dict[str, Any]
"""Report as bench/measure.py writes it, to which `with_figures` adds."""


@dataclass(frozen=True, slots=True)
class Column:
    """Figure that has a column in a table."""

    key: str
    title: str
    unit: str
    divisor: float = 1
    spreads: bool = True
    """Whether the table has its 95th percentile."""
    drawn: bool = False
    """Whether the chart has it."""

    def formatted(self, value: float | None) -> str:
        """Return the value in the column's unit."""
        if value is None:
            return "never"
        shown = value / self.divisor
        return f"{shown:.0f}" if abs(shown) >= 100 or shown == 0 else f"{shown:.1f}"


@dataclass(frozen=True, slots=True)
class Section:
    """Measurements that are made together, and have a table."""

    name: str
    samples: str
    """Unit of the count of samples."""
    base: str | None
    """System that the ratios refer to, if there are any."""
    columns: tuple[Column, ...]


CYCLES: Final = Section(
    "cycles",
    "cycles",
    LIMIT,
    (
        Column("kernel_add_to_mounted", "kernel add -> mounted", "ms", drawn=True),
        Column("udev_add_to_mounted", "udev add -> mounted", "ms", drawn=True),
        Column("removed_to_nothing_left", "removed -> nothing left", "ms", drawn=True),
        Column("own_cpu", "own CPU", "ms"),
        Column("guest_cpu", "guest's CPU", "ms"),
        Column("rss_kib", "RSS", "MB", 1000 / 1.024, spreads=False),
        Column("pss_kib", "PSS", "MB", 1000 / 1.024, spreads=False),
    ),
)
STORM: Final = Section(
    "storm",
    "storms",
    LIMIT,
    (
        Column("sticks_to_mounted", "16 sticks -> all mounted", "s", 1000, drawn=True),
        Column("disks_to_mounted", "64 disks -> all mounted", "s", 1000, drawn=True),
        Column("disks_to_nothing_left", "64 disks -> nothing left", "s", 1000, drawn=True),
    ),
)
SCALING: Final = Section(
    "scaling",
    "arrivals each",
    LIMIT,
    (
        Column("first", "kernel add -> mounted beside no other", "ms", drawn=True),
        Column("sixteenth", "kernel add -> mounted beside 15 others", "ms", drawn=True),
        Column("last", "kernel add -> mounted beside 63 others", "ms", drawn=True),
    ),
)
START: Final = Section(
    "start",
    "starts",
    BARE,
    (
        Column("exec_to_ready", "exec -> READY", "ms", drawn=True),
        Column("ready_rss_kib", "RSS", "MB", 1000 / 1.024, spreads=False),
    ),
)
IDLE: Final = Section(
    "idle",
    "minutes with a medium mounted",
    None,
    (
        Column("wake_ups", "wake-ups", "", spreads=False),
        Column("watchdogs", "the watchdog's", "", spreads=False),
        Column("other_wake_ups", "others", "", spreads=False),
    ),
)
SECTIONS: Final = {section.name: section for section in (CYCLES, STORM, SCALING, START, IDLE)}
COLUMNS: Final = {column.key: column for s in SECTIONS.values() for column in s.columns}
REST: Final = Column("removed_to_rest_gone", "removed -> all else gone", "ms")
"""Not in the table: shown only for a system that has leftovers."""
TIMES: Final = CYCLES.columns[:3]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the nearest-rank percentile: the least value that this many percent do not exceed."""
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


def figure(values: Sequence[float | None]) -> Figure:
    """Return the figures of a system's samples; what never came counts as the latest."""
    times = [math.inf if value is None else value for value in values]
    found = {
        "median": statistics.median(times),
        "p95": percentile(times, 95),
        "min": min(times),
        "max": max(times),
    }
    return {name: None if value == math.inf else value for name, value in found.items()}


def with_figures(report: Report) -> Report:
    """Add to the report the figures of each section and system, and the noise."""
    sections = {
        name: {system: _figures(samples, SECTIONS[name]) for system, samples in systems.items()}
        for name, systems in report["samples"].items()
    }
    for name, systems in sections.items():
        base = systems.get(SECTIONS[name].base or "", {})
        for found in systems.values():
            for key, one in found.items():
                one["ratio"] = _ratio(one["median"], base.get(key, {}).get("median"))
    done = {**report, "figures": sections}
    return {**done, "noise": noise(done)}


def _figures(samples: Sequence[dict[str, Any]], section: Section) -> dict[str, Figure]:
    columns = (*section.columns, REST) if section is CYCLES else section.columns
    return {c.key: figure([sample[c.key] for sample in samples]) for c in columns}


def _ratio(median: float | None, base: float | None) -> float | None:
    return None if median is None or not base else median / base


def noise(report: Report) -> dict[str, float]:
    """Return the ratio between the largest and the least of the limit's own times.

    The same binary did the same each time, so smaller differences between systems mean nothing.
    """
    found = report["figures"].get(CYCLES.name, {}).get(LIMIT, {})
    return {
        column.key: one["max"] / one["min"]
        for column in TIMES
        if (one := found.get(column.key)) and one["min"] and one["max"]
        if len(report["samples"][CYCLES.name][LIMIT]) > 1
    }


def heading(report: Report) -> str:
    """Return the report's date and machine."""
    machine = report["machine"]
    return (
        f"{report['date']}, {machine['architecture']}, Linux {machine['kernel']}, "
        f"{machine['cpus']} CPUs; {report['medium']}"
    )


def formatted(one: Figure, column: Column) -> str:
    """Format the median, and the 95th percentile if there is one."""
    median = column.formatted(one["median"])
    spreads = column.spreads and one["median"] is not None
    return f"{median} ({column.formatted(one['p95'])})" if spreads else median
