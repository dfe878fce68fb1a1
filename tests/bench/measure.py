"""Measures the agent beside other systems that serve media, and writes the report.

    python3 -m bench.measure --what cycles,storm --systems agent,L --cycles 12 REPORT

Runs in the guest, as root, while nothing else serves media; `vm/bench.py` prepares that.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from bench import service
from bench.cycles import cycles
from bench.storms import scaling, storms
from bench.systems import MOUNT_ROOT, SLICE, SYSTEMS
from bench.turns import Samples
from kernel.witness import run

WHAT: Final = ("cycles", "storm", "scaling", "start", "idle")
"""Sections of the report, in their order."""


def options() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.measure", description=__doc__)
    parser.add_argument("--what", default=["cycles"], type=_some_of(WHAT, "is not measured"))
    known = _some_of(SYSTEMS, "is no system")
    parser.add_argument("--systems", default=list(SYSTEMS), type=known)
    before = "checkout of another version, for the system `before`"
    parser.add_argument("--before", type=Path, help=before)
    parser.add_argument("--cycles", default=12, type=int, help="and arrivals, and starts")
    parser.add_argument("--storms", default=3, type=int)
    parser.add_argument("--minutes", default=1, type=int)
    trial = parser.add_argument_group("for a trial; the tables' titles do not follow")
    trial.add_argument("--sticks", default=16, type=int)
    trial.add_argument("--disks", default=64, type=int)
    trial.add_argument("--warm-ups", default=1, type=int, help="in each turn; they do not count")
    trial.add_argument("--minute-s", default=60, type=float, help="how long a minute takes")
    parser.add_argument("report", type=Path)
    return parser


def main() -> int:
    """Write the report as JSON. Returns: the exit status."""
    asked = options().parse_args()
    _go_before_others()
    services = {"agent": SYSTEMS["agent"], "bare": service.bare()}
    measures: dict[str, Callable[[], Samples]] = {
        "cycles": lambda: cycles(asked.systems, asked.cycles, asked.warm_ups),
        "storm": lambda: storms(asked.systems, asked.storms, asked.sticks, asked.disks),
        "scaling": lambda: scaling(asked.systems, asked.cycles, asked.disks, asked.warm_ups),
        "start": lambda: service.starts(services, asked.cycles),
        "idle": lambda: service.idle(asked.minutes, asked.minute_s),
    }
    samples = {}
    with ExitStack() as held:
        # Started here, so that its count of processor time remains while no service runs in it.
        run("systemctl", "start", SLICE)
        held.callback(run, "systemctl", "stop", SLICE)
        MOUNT_ROOT.mkdir(mode=0o755, exist_ok=True)
        for name in WHAT:
            if name in asked.what:
                print(f"{name}:", flush=True)
                samples[name] = measures[name]()
    seen = dict.fromkeys(name for found in samples.values() for name in found)
    known = {**SYSTEMS, **services}
    report = {
        "machine": machine(),
        "systems": {name: known[name].what for name in seen},
        "samples": samples,
    }
    asked.report.write_text(json.dumps(report))
    return 0


def _go_before_others() -> None:
    """Let what keeps the processors busy delay what is measured, and not its watcher.

    What this program starts, as the thread that pulls a medium, has the usual priority.
    """
    policy = os.SCHED_FIFO | os.SCHED_RESET_ON_FORK
    os.sched_setscheduler(0, policy, os.sched_param(1))


def machine() -> dict[str, Any]:
    """Return the facts of the machine that the figures depend on."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _some_of(known: Collection[str], complaint: str) -> Callable[[str], list[str]]:
    def parsed(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(
                f"{unknown[0]!r} {complaint}; there are {', '.join(known)}"
            )
        return list(dict.fromkeys(names))

    return parsed


if __name__ == "__main__":
    sys.exit(main())
