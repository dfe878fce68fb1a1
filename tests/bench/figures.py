"""What the measured cycles amount to: medians, percentiles, ratios to the limit, goals, a chart."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final
from xml.sax.saxutils import escape

LIMIT: Final = "L"
AGENT: Final = "agent"

Figure = dict[str, Any]
"""Median, 95th percentile, least, most and ratio of a column; None where there is none."""

Report = dict[str, Any]
"""As bench/cycles.py writes it, and `with_figures` adds to it."""


@dataclass(frozen=True, slots=True)
class Column:
    """A figure that has its column in the table."""

    key: str
    title: str
    unit: str
    divisor: float = 1
    spreads: bool = True
    """Whether the table has its 95th percentile."""

    def told(self, value: float | None) -> str:
        """The value in the column's unit."""
        if value is None:
            return "never"
        shown = value / self.divisor
        return f"{shown:.0f}" if shown >= 100 or shown == 0 else f"{shown:.1f}"


COLUMNS: Final = (
    Column("kernel_add_to_mounted", "kernel add -> mounted", "ms"),
    Column("udev_add_to_mounted", "udev add -> mounted", "ms"),
    Column("removed_to_nothing_left", "removed -> nothing left", "ms"),
    Column("own_cpu", "own CPU", "ms"),
    Column("guest_cpu", "guest's CPU", "ms"),
    Column("rss_kib", "RSS", "MB", 1000 / 1.024, spreads=False),
    Column("pss_kib", "PSS", "MB", 1000 / 1.024, spreads=False),
)
TIMES: Final = COLUMNS[:3]


@dataclass(frozen=True, slots=True)
class Goal:
    """What the agent is to keep to; the figure is the median."""

    column: str
    most: float
    to_limit: bool = True
    """Whether it is a ratio to the limit of the same run; else it is in the column's unit."""


GOALS: Final = (
    Goal("udev_add_to_mounted", 2.0),
    Goal("kernel_add_to_mounted", 0.6),
    Goal("removed_to_nothing_left", 1.5),
    Goal("own_cpu", 3),
    Goal("rss_kib", 20, to_limit=False),
)


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least so many percent of all do not exceed: the nearest rank."""
    return sorted(values)[max(1, math.ceil(len(values) * percent / 100)) - 1]


def figures(values: Sequence[float | None]) -> dict[str, float | None]:
    """What a column has of a system's cycles; None, what never came, is later than all that did."""
    times = [math.inf if value is None else value for value in values]
    found = {
        "median": statistics.median(times),
        "p95": percentile(times, 95),
        "min": min(times),
        "max": max(times),
    }
    return {name: None if value == math.inf else value for name, value in found.items()}


def with_figures(report: Report) -> Report:
    """The report with what its cycles amount to, the ratios to the limit, and the goals."""
    systems = {
        name: {
            **system,
            "figures": {
                key: figures([cycle[key] for cycle in system["cycles"]])
                for key in system["cycles"][0]
                if key != "left"
            },
            "left": sorted({thing for cycle in system["cycles"] for thing in cycle["left"]}),
        }
        for name, system in report["systems"].items()
    }
    limit = systems.get(LIMIT)
    for system in systems.values():
        for key, figure in system["figures"].items():
            base = None if limit is None else limit["figures"][key]["median"]
            figure["ratio"] = (
                figure["median"] / base if base and figure["median"] is not None else None
            )
    done = {**report, "systems": systems}
    return {**done, "noise": noise(done), "goals": goals(done)}


def noise(report: Report) -> dict[str, float] | None:
    """By what factor the limit's own figures differ: of a column, the most by the least.

    The same binary did the same each time, so smaller differences between systems mean nothing.
    """
    if LIMIT not in report["systems"] or len(report["systems"][LIMIT]["cycles"]) == 1:
        return None
    found = report["systems"][LIMIT]["figures"]
    return {
        column.key: found[column.key]["max"] / found[column.key]["min"]
        for column in TIMES
        if found[column.key]["min"] and found[column.key]["max"]
    }


def goals(report: Report) -> list[dict[str, Any]]:
    """The goals that can be told of in this run: the agent's, and the limit's if it takes one."""
    systems = report["systems"]
    if AGENT not in systems:
        return []
    columns = {column.key: column for column in COLUMNS}
    found = []
    for goal in GOALS:
        figure, column = systems[AGENT]["figures"][goal.column], columns[goal.column]
        if figure["median"] is None:
            value = math.inf
        else:
            value = figure["ratio"] if goal.to_limit else figure["median"] / column.divisor
        if value is not None:
            unit = f"x {LIMIT}" if goal.to_limit else column.unit
            found.append(
                {
                    "title": column.title,
                    "most": goal.most,
                    "unit": unit,
                    "value": value,
                    "met": value <= goal.most,
                }
            )
    return found


def table(report: Report) -> str:
    """The report for people: where and when, a line for each system, what they are, the goals."""
    systems = report["systems"]
    cycles = max(len(system["cycles"]) for system in systems.values())
    rows = [
        ["", *(column.title.partition("-> ")[0].strip() for column in COLUMNS)],
        ["", *(_below(column) for column in COLUMNS)],
        *(
            [name, *(_cell(system, column) for column in COLUMNS)]
            for name, system in systems.items()
        ),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        heading(report),
        f"medians (95th percentiles) of {cycles} cycles, x ratio to {LIMIT}; {_noise(report)}",
        "",
        *(_line(cells, widths) for cells in rows),
        "",
        *(f"{name.ljust(widths[0])}  {system['what']}" for name, system in systems.items()),
        *(_leaves(name, system) for name, system in systems.items() if system["left"]),
    ]
    if report["goals"]:
        lines += ["", *map(_goal, report["goals"])]
    return "\n".join(lines) + "\n"


def _below(column: Column) -> str:
    _, arrow, end = column.title.partition("-> ")
    return f"{arrow}{end}, {column.unit}" if arrow else column.unit


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures_of_it = (
        cell.ljust(width) if at == 0 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *figures_of_it]).rstrip()


def heading(report: Report) -> str:
    """Of which day and which machine the report is."""
    machine = report["machine"]
    return (
        f"{report['date']}, {machine['architecture']}, Linux {machine['kernel']}, "
        f"{machine['cpus']} CPUs; {report['medium']}"
    )


def _noise(report: Report) -> str:
    if not report["noise"]:
        return "noise unknown"
    worst = max(report["noise"].values())
    return f"noise: {LIMIT}'s own times differ by up to x{worst:.1f}"


def _cell(system: dict[str, Any], column: Column) -> str:
    figure = system["figures"][column.key]
    if figure["max"] == 0:
        return "-"
    ratio = "" if figure["ratio"] is None else f" x{figure['ratio']:.2f}"
    return f"{_told(figure, column)}{ratio}"


def _told(figure: Figure, column: Column) -> str:
    median = column.told(figure["median"])
    spreads = column.spreads and figure["median"] is not None
    return f"{median} ({column.told(figure['p95'])})" if spreads else median


def _leaves(name: str, system: dict[str, Any]) -> str:
    """What of a pulled medium is there for good, and how soon all else is gone."""
    column = Column("removed_to_rest_gone", "", "ms")
    rest = _told(system["figures"][column.key], column)
    return f"{name} leaves behind: {', '.join(system['left'])}; all else is gone after {rest} ms"


def _goal(goal: dict[str, Any]) -> str:
    met = "met   " if goal["met"] else "missed"
    return f"{met}  {goal['title']} at most {goal['most']:g} {goal['unit']}: {goal['value']:.2f}"


_PLOT: Final = 420
_LEFT: Final = 80
_BAR: Final = 16
_STEP: Final = 24


def chart(report: Report) -> str:
    """An SVG picture: for each of the times a bar to the median and a line on to the p95."""
    systems = report["systems"]
    parts, top = [], 40
    for column in TIMES:
        ends = [system["figures"][column.key]["p95"] for system in systems.values()]
        most = max((end for end in ends if end is not None), default=1)
        parts.append(_text(_LEFT, top, f"{column.title}, {column.unit}", "start", bold=True))
        for name, system in systems.items():
            top += _STEP
            parts += _bar(top, name, system["figures"][column.key], column, _PLOT / most)
        top += 2 * _STEP
    width, height = _LEFT + _PLOT + 130, top - _STEP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f"{_text(_LEFT, 16, heading(report), 'start')}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(top: int, name: str, figure: Figure, column: Column, scale: float) -> list[str]:
    if figure["p95"] is None:
        told = "never" if figure["median"] is None else _told(figure, column)
        return [_text(_LEFT - 8, top, name, "end"), _text(_LEFT + 8, top, told, "start")]
    median, p95 = figure["median"] * scale, figure["p95"] * scale
    middle = top - _BAR // 2 + 4
    colour = {LIMIT: "#888888", AGENT: "#1b6ca8"}.get(name, "#c9a227")
    return [
        _text(_LEFT - 8, top, name, "end"),
        f'<rect x="{_LEFT}" y="{middle - _BAR // 2}" width="{median:.1f}" height="{_BAR}" '
        f'fill="{colour}"/>',
        f'<path d="M{_LEFT + median:.1f} {middle}H{_LEFT + p95:.1f}m0 -4v8" stroke="black"/>',
        _text(round(_LEFT + p95 + 8), top, _told(figure, column), "start"),
    ]


def _text(x: int, y: int, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
