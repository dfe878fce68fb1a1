"""The command `measure replug`."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from caam_hotplug import names
from caam_hotplug.errors import shown
from measure import running
from measure.replug import NAME
from measure.replug import agent as agents
from measure.replug import report as reports
from measure.replug.agent import Agent
from measure.replug.cycle import cycle
from measure.replug.medium import BLOCKS, Medium
from measure.replug.slot import Slot, replugger, slot_of
from measure.replug.watch import Watch
from measure.running import MeasureError


def run(given: argparse.Namespace) -> int:
    """Measure and print the table, or nothing of it. Returns: the exit status."""

    def measure_and_tell() -> None:
        report = measure(given.which, given.cycles, given.by_hand, given.json)
        print(reports.table(report))
        if given.json:
            given.json.write_text(json.dumps(report, indent=2) + "\n")

    return running.exit_status(NAME, measure_and_tell)


def measure(which: str, cycles: int, by_hand: bool, file: Path | None) -> dict[str, Any]:
    """Measure so many cycles; the medium is back afterwards. Raises: HotplugError; OSError."""
    running.require_root("pull and plug a medium")
    agent = agents.ask(which)
    medium = _mounted_medium(agent)
    _require_elsewhere(file, medium)
    slot = _slot(medium, by_hand)
    report = reports.about(agent, medium, slot) | {"cycles": cycles, "by_hand": by_hand}
    os.chdir("/")  # where we are may be on the medium
    gc.disable()  # it would be part of what is measured
    samples: list[dict[str, float]] = []
    watch = Watch()
    with replugger(None if by_hand else slot) as by:
        for number in range(1, cycles + 1):
            print(f"cycle {number} of {cycles}", file=sys.stderr, flush=True)
            medium, sample = cycle(agent, medium, watch, by)
            samples.append(sample)
    return report | {"figures": reports.figures(samples), "samples": samples}


def _mounted_medium(agent: Agent) -> Medium:
    volume = agent.volume
    if volume.state != "mounted":
        raise MeasureError(
            f"{volume.display_name} is not mounted, but {volume.status_text}; "
            f"`{names.PROGRAM} explain {shown(volume.device)}` says more"
        )
    return Medium.find(Path(volume.device).name, volume.mount_point)


def _require_elsewhere(file: Path | None, medium: Medium) -> None:
    if file is not None and file.parent.stat().st_dev == Path(medium.point).stat().st_dev:
        raise MeasureError(f"{shown(file)} is on the medium itself; choose another place")


def _slot(medium: Medium, by_hand: bool) -> Slot | None:
    """Find the slot. Returns: None if software cannot pull the medium, and need not."""
    slot = slot_of((BLOCKS / medium.disk).resolve(), medium.volume.bus)
    if slot is None and not by_hand:
        raise MeasureError(
            f"software cannot pull {medium.volume.node}, which is attached by "
            f"{medium.volume.bus.value}; run it with --by-hand"
        )
    return slot
