"""Reports of the measurement, for users and programs; they do not identify the medium."""

from __future__ import annotations

import datetime
import math
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from caam_hotplug import names
from caam_hotplug.config import loader
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import config_files
from caam_hotplug.model import SECTOR_BYTES, Bus
from measure import machine
from measure.figures import shown, spread
from measure.machine import described, read_text
from measure.replug.agent import Agent
from measure.replug.medium import Medium
from measure.replug.slot import Slot

SOC: Final = Path("/sys/devices/soc0")
HEAD: Final = (
    (
        "{date}", "{machine}", "{soc}", "{architecture}", "Linux {kernel}", "{cpus} CPUs",
        "governor {governor}",
    ),
    ("caam-hotplug {caam_hotplug}", "Python {python}", "systemd {systemd}", "{waits}"),
    ("{bus}", "{usb_mbit_s} Mbit/s", "{model}", "{size_mb} MB", "{filesystem}", "{how}"),
)  # fmt: skip
COLUMNS: Final = ("median", "p95", "min", "max")


def about(agent: Agent, medium: Medium, slot: Slot | None) -> dict[str, Any]:
    """Describe the machine, the programs and the medium."""
    try:
        configured = loader.load(names.CONFIG_FILE, config_files.AnyonesFiles(), required=False)
    except HotplugError:
        configured = None
    volume = medium.volume
    model = " ".join(filter(None, (volume.vendor, volume.model)))
    speed = read_text(slot.folder / "speed") if slot and volume.bus is Bus.USB else None
    soc = (read_text(SOC / name) for name in ("family", "soc_id", "revision"))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **machine.facts(),
        "soc": " ".join(filter(None, soc)) or None,
        "caam_hotplug": agent.version,
        "python": platform.python_version(),
        "systemd": agent.systemd,
        "await_udev": configured.await_udev if configured else None,
        "bus": volume.bus.value,
        "usb_mbit_s": speed,
        "model": model or None,
        "size_mb": round(volume.size * SECTOR_BYTES / 1e6),
        "filesystem": agent.volume.filesystem,
    }


def figures(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Find median, 95th percentile (the nearest rank), least and most of each column."""
    titles = dict.fromkeys(title for sample in samples for title in sample)
    columns = {title: sorted(one[title] for one in samples if title in one) for title in titles}
    return {
        title: spread(values, 3) | {"p95": values[math.ceil(len(values) * 0.95) - 1]}
        for title, values in columns.items()
    }


def table(report: Mapping[str, Any]) -> str:
    """Write the report for users, without unknown figures."""
    waits = "unknown" if report["await_udev"] is None else report["await_udev"]
    how = f"{report['cycles']} cycles by {'hand' if report['by_hand'] else 'software'}"
    known = {**report, "waits": f"await_udev {waits}".lower(), "how": how}
    lines = [described(templates, known) for templates in HEAD]
    lines += ["", f"{'':<40}" + "".join(f"{head:>10}" for head in COLUMNS)]
    for title, figure in report["figures"].items():
        cells = (shown(figure[head], 2) for head in COLUMNS)
        lines.append(f"{title:<40}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)
