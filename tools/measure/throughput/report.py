"""Reports of the measurement, for users and for programs."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping
from typing import Any, Final

from caam_hotplug import __version__
from measure import machine
from measure.figures import shown, spread
from measure.machine import described
from measure.throughput.rows import COLUMNS, MIB, Row, Settings

HEAD: Final = (
    "{day}", "{called}", "Linux {kernel}", "{cpus} CPUs", "governor {governor}"
)  # fmt: skip


def made(settings: Settings, rows: list[Row], absent: Mapping[str, str]) -> dict[str, Any]:
    """Describe the machine, the settings and each row, with its ratio to the reference."""
    (reference,) = (row for row in rows if row.is_reference)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "caam_hotplug": __version__,
        **machine.facts(),
        "rounds": settings.rounds,
        "size_mib": settings.size_bytes // MIB,
        "in_flight": settings.in_flight,
        "reads": settings.reads,
        "left_out": absent,
        "rows": [_described(row, reference) for row in rows],
    }


def _described(row: Row, reference: Row) -> dict[str, Any]:
    told: dict[str, Any] = {"key": row.key.name}
    if row.key.add is not None:
        told |= {
            "cipher": row.key.cipher,
            "driver": row.key.driver,
            "sector_size": row.sector_size,
            "flags": list(row.flags),
        }
    if row.failure:
        return {**told, "failed": row.failure}
    for column in COLUMNS:
        values, base = row.figures[column], reference.figures.get(column)
        ratio = statistics.median(values) / statistics.median(base) if base else None
        told[column] = spread(values, 2) | {"ratio": None if ratio is None else round(ratio, 3)}
    return told


def table(report: Mapping[str, Any]) -> str:
    """Write the report for users."""
    called = report["machine"] or report["architecture"]
    lines = [
        described(HEAD, {**report, "day": report["date"][:10], "called": called}),
        f"{report['size_mib']} MiB in memory; sequential requests of 1 MiB, "
        f"{report['in_flight']} at a time; 4 KiB reads one at a time; O_DIRECT",
        f"medians of {report['rounds']} rounds (least-most), x ratio to software with sectors of "
        "512 bytes and no flags",
    ]
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    titles = "".join(f"{title:>23}" for title in COLUMNS.values())
    key = None
    for row in report["rows"]:
        if row["key"] != key:
            key = row["key"]
            by = f": {row['cipher']}, by {row['driver']}" if "cipher" in row else ": no dm-crypt"
            lines += ["", f"{key}{by}", f"  {'sector':<8}{'flags':<36}{titles}"]
        lines.append(_line(row))
    return "\n".join(lines)


def _line(row: Mapping[str, Any]) -> str:
    sector, flags = row.get("sector_size", "-"), "-"
    if "flags" in row:
        flags = " ".join(row["flags"]) or "none"
    what = f"  {sector:<8}{flags:<36}"
    if "failed" in row:
        return f"{what}  failed: {row['failed']}"
    return what + "".join(f"{_cell(row[column]):>23}" for column in COLUMNS)


def _cell(figure: Mapping[str, Any]) -> str:
    median, least, most = (shown(figure[name], 1) for name in ("median", "min", "max"))
    ratio = "" if figure["ratio"] is None else f" x{figure['ratio']:.2f}"
    return f"{median} ({least}-{most}){ratio}"
