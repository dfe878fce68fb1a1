"""Volumes as a table for users, and as JSON for programs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

from caam_hotplug.dbus.volume_view import ShownVolume
from caam_hotplug.errors import shown

_HEAD: Final = ("LABEL", "DEVICE", "SIZE", "STATE", "FOR", "MOUNT POINT OR REASON")
_STATE: Final = _HEAD.index("STATE")
_COLOURS: Final = {
    "mounted": "32",
    "unlocked": "32",
    "failed": "31",
    "stuck": "31",
    "removed-unsafely": "31",
    "conflict": "33",
    "waiting": "33",
}
_DURATION_UNITS: Final = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))
_SIZE_UNITS: Final = ("B", "KiB", "MiB", "GiB", "TiB")


def table(
    volumes: Sequence[ShownVolume],
    *,
    include_ignored: bool,
    coloured: bool,
    now_us: int | None = None,
) -> Iterator[str]:
    """Yield the lines of the table. `now_us`: microseconds since 1970."""
    now = time.time_ns() // 1000 if now_us is None else now_us
    listed = [v for v in volumes if include_ignored or v.state != "ignored"]
    if listed:
        rows = [_HEAD, *(_row(volume, now) for volume in listed)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
        for number, row in enumerate(rows):
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            if coloured and number:
                cells[_STATE] = in_colour(cells[_STATE], row[_STATE])
            yield "  ".join(cells).rstrip()
    else:
        yield "no media"
    hidden = len(volumes) - len(listed)
    if hidden:
        yield f"({hidden} that no rule matches: --all)"


def to_json(volumes: Sequence[ShownVolume], version: str, counters: Mapping[str, int]) -> str:
    """Return one JSON object."""
    import json  # noqa: PLC0415  only --json needs it

    listed = [as_json(volume) for volume in volumes]
    return json.dumps({"version": version, "counters": counters, "volumes": listed}, indent=2)


def as_json(volume: ShownVolume) -> dict[str, Any]:
    """Return the volume's keys and values."""
    return asdict(volume)


def in_colour(text: str, state: str) -> str:
    """Return the text in the colour of the state, if it has one."""
    colour = _COLOURS.get(state)
    return f"\x1b[{colour}m{text}\x1b[0m" if colour else text


def _row(volume: ShownVolume, now_us: int) -> tuple[str, ...]:
    return (
        shown(volume.label) or "-",
        shown(volume.device),
        _size(volume.size_bytes),
        shown(volume.state),
        _duration(now_us - volume.since_us),
        volume.mount_or_reason,
    )


def _size(count: int) -> str:
    amount, unit = float(count), 0
    while amount >= 1024 and unit < len(_SIZE_UNITS) - 1:
        amount, unit = amount / 1024, unit + 1
    digits = f"{amount:.3g}" if amount < 1000 else f"{amount:.0f}"
    return f"{digits} {_SIZE_UNITS[unit]}"


def _duration(microseconds: int) -> str:
    seconds = max(0, microseconds // 1_000_000)
    for length, unit in _DURATION_UNITS:
        if seconds >= length:
            return f"{seconds // length} {unit}"
    return "0 s"
