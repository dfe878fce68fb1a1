"""Figures of several measurements, and how a table shows them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence


def spread(values: Sequence[float], places: int) -> dict[str, float]:
    """Find the median, the least and the greatest value, rounded to so many decimal places."""
    return {
        "median": round(statistics.median(values), places),
        "min": round(min(values), places),
        "max": round(max(values), places),
    }


def shown(value: float, places: int) -> str:
    """Write the value with three digits, but with no more than so many decimal places."""
    fitting = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{min(fitting, places)}f}"
