"""The report as text: a table for each section, the systems, the goals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from bench.figures import (
    CYCLES,
    REST,
    SECTIONS,
    Column,
    Figure,
    Report,
    Section,
    formatted,
    heading,
)
from bench.goals import Verdict


def tables(report: Report) -> str:
    """Return the whole text."""
    parts = [heading(report)]
    parts += [_section(report, SECTIONS[name]) for name in report["figures"]]
    parts.append("\n".join(_systems(report)))
    if report["goals"]:
        parts.append("\n".join(map(_goal, report["goals"])))
    return "\n\n".join(parts) + "\n"


def _section(report: Report, section: Section) -> str:
    systems = report["figures"][section.name]
    below = [_below(column) for column in section.columns]
    rows = [
        ["", *(column.title.partition("-> ")[0].strip() for column in section.columns)],
        *([["", *below]] if any(below) else []),
        *([name, *_cells(found, section)] for name, found in systems.items()),
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join([_caption(report, section), *(_line(cells, widths) for cells in rows)])


def _caption(report: Report, section: Section) -> str:
    count = max(map(len, report["samples"][section.name].values()))
    ratios = f", x ratio to {section.base}" if section.base else ""
    caption = f"medians (95th percentiles) of {count} {section.samples}{ratios}"
    if section is not CYCLES:
        return caption
    if not report["noise"]:
        return f"{caption}; noise unknown"
    worst = max(report["noise"].values())
    return f"{caption}; noise: {section.base}'s own times differ by up to x{worst:.1f}"


def _below(column: Column) -> str:
    _, arrow, end = column.title.partition("-> ")
    return f"{arrow}{end}, {column.unit}" if arrow else column.unit


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    name, *figures = (
        cell.ljust(width) if at == 0 else cell.rjust(width)
        for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return "  ".join([name, *figures]).rstrip()


def _cells(found: dict[str, Figure], section: Section) -> list[str]:
    return [_cell(found[column.key], column) for column in section.columns]


def _cell(one: Figure, column: Column) -> str:
    if one["max"] == 0 and column.unit:
        return "-"
    ratio = "" if one["ratio"] is None else f" x{one['ratio']:.2f}"
    return f"{formatted(one, column)}{ratio}"


def _systems(report: Report) -> list[str]:
    """Describe each system, and what it leaves of a pulled medium by design."""
    width = max(map(len, report["systems"]))
    lines = [f"{name.ljust(width)}  {what}" for name, what in report["systems"].items()]
    for name, samples in report["samples"].get(CYCLES.name, {}).items():
        if leaving := [sample["left"] for sample in samples if sample["left"]]:
            things = ", ".join(sorted(set(itertools.chain.from_iterable(leaving))))
            rest = formatted(report["figures"][CYCLES.name][name][REST.key], REST)
            lines.append(
                f"{name} leaves behind, in {len(leaving)} of {len(samples)} cycles: {things}; "
                f"all else is gone after {rest} {REST.unit}"
            )
    return lines


def _goal(goal: Verdict) -> str:
    met = "met   " if goal["met"] else "missed"
    value: Any = "never" if goal["value"] is None else f"{goal['value']:.2f}"
    most = f"{goal['most']:g} {goal['unit']}".rstrip()
    return f"{met}  {goal['title']} at most {most}: {value}"
