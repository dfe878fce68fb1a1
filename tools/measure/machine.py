"""What a report says of the machine; nothing in it tells one board from another of its kind."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def facts() -> dict[str, Any]:
    """Read the facts that every report has; None stands for one that is not known."""
    return {
        "machine": read_text(Path("/proc/device-tree/model")),
        "architecture": os.uname().machine,
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "governor": read_text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
    }


def read_text(file: Path) -> str | None:
    """Read a file of /proc or /sys, without what ends it; None if it cannot be read."""
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def described(templates: Iterable[str], known: Mapping[str, Any]) -> str:
    """Fill in the templates and list those of which every fact is known."""
    of = {name: str(value) for name, value in known.items() if value is not None}
    filled = []
    for template in templates:
        with suppress(KeyError):
            filled.append(template.format_map(of))
    return ", ".join(filled)
