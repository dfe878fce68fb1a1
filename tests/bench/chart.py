"""The report as a picture: SVG, with a bar for each median and a line to the 95th percentile."""

from __future__ import annotations

from typing import Final
from xml.sax.saxutils import escape

from bench.figures import AGENT, SECTIONS, Column, Figure, Report, formatted, heading

_PLOT: Final = 420
_LEFT: Final = 80
_BAR: Final = 16
_STEP: Final = 24
_COLOURS: Final = {"L": "#888888", "bare": "#888888", AGENT: "#1b6ca8"}
_OTHERS: Final = "#c9a227"


def chart(report: Report) -> str:
    """Draw each measured time of all systems."""
    parts, top = [], 40
    for name, systems in report["figures"].items():
        for column in SECTIONS[name].columns:
            if not column.drawn:
                continue
            found = {system: figures[column.key] for system, figures in systems.items()}
            parts.append(_text(_LEFT, top, f"{column.title}, {column.unit}", "start", bold=True))
            most = max((one["p95"] for one in found.values() if (one["p95"] or 0) > 0), default=1)
            for system, one in found.items():
                top += _STEP
                parts += _bar(top, system, one, column, _PLOT / most)
            top += 2 * _STEP
    width, height = _LEFT + _PLOT + 130, top - _STEP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n'
        f"{_text(_LEFT, 16, heading(report), 'start')}\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _bar(top: int, name: str, one: Figure, column: Column, scale: float) -> list[str]:
    label = _text(_LEFT - 8, top, name, "end")
    if one["p95"] is None:
        return [label, _text(_LEFT + 8, top, formatted(one, column), "start")]
    # A system that acts on the kernel's event may mount before udev's event: it has no bar.
    median, p95 = (max(0.0, one[which] * scale) for which in ("median", "p95"))
    middle = top - _BAR // 2 + 4
    colour = _COLOURS.get(name, _OTHERS)
    return [
        label,
        f'<rect x="{_LEFT}" y="{middle - _BAR // 2}" width="{median:.1f}" height="{_BAR}" '
        f'fill="{colour}"/>',
        f'<path d="M{_LEFT + median:.1f} {middle}H{_LEFT + p95:.1f}m0 -4v8" stroke="black"/>',
        _text(round(_LEFT + p95 + 8), top, formatted(one, column), "start"),
    ]


def _text(x: int, y: int, text: str, anchor: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{weight}>{escape(text)}</text>'
