"""The service itself: how soon it is ready, and whether it is quiet while nothing happens."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

from bench.cycles import pulled
from bench.systems import AGENT, HERE, LABEL, SLICE, SYSTEMS, System, memory_kib
from bench.turns import Sample, Samples, in_turns, shown
from bench.watcher import Watcher
from kernel.cartridges import cartridges
from kernel.witness import run

INSTALLED: Final = Path("/usr/lib/systemd/system") / AGENT
BARE_UNIT: Final = "bench-bare.service"
LOOKED_AT_EVERY_S: Final = 1
"""The watchdog is told less often."""


def bare() -> System:
    """A script that is ready as soon as a Python process can be, with the agent's own settings."""
    service, _, _ = INSTALLED.read_text().partition("[Service]")[2].partition("[Install]")
    settings = [line for line in service.splitlines() if not line.startswith("Exec")]
    command = f"ExecStart=/usr/bin/python3 -I {HERE}/bare.py"
    unit = "\n".join(["[Service]", f"Slice={SLICE}", command, *settings, ""])
    return System(
        "asyncio and pyudev imported, a monitor opened, READY said", (BARE_UNIT,), {BARE_UNIT: unit}
    )


def starts(systems: dict[str, System], count: int) -> Samples:
    """Each service was started so often: from its program's start until it was ready."""

    def turn(name: str, _: int) -> list[Sample]:
        with systems[name].running(), shown(name):
            unit = systems[name].units[0]
            begun, ready = _moments_us(unit, "ExecMainStart", "ActiveEnter")
            return [{"exec_to_ready": (ready - begun) / 1000, "ready_rss_kib": memory_kib()["Rss"]}]

    return in_turns(list(systems), count, turn, in_a_turn=1)


def idle(minutes: int, seconds: float) -> Samples:
    """What the agent did in so many minutes, of so many seconds, with a medium mounted."""
    agent = SYSTEMS["agent"]
    with (
        cartridges([LABEL]) as (medium,),
        closing(Watcher()) as watcher,
        agent.running(),
        shown("agent"),
        pulled(medium),
    ):
        watcher.arrival(medium.plug, [agent.point()])
        watcher.settle()
        found = [_minute(seconds) for _ in range(minutes)]
        watcher.departure(medium.pull)
    return {"agent": found}


def _minute(seconds: float) -> Sample:
    """How often a thread of the agent's was woken, and how often the watchdog was told.

    A thread that was woken sleeps again, which is what the kernel counts: proc(5), status.
    """
    pid = run("systemctl", "show", "--property=MainPID", "--value", AGENT).strip()
    told = set(_moments_us(AGENT, "Watchdog"))
    before = sum(_sleeps(pid))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(LOOKED_AT_EVERY_S)
        told.update(_moments_us(AGENT, "Watchdog"))
    wake_ups, watchdogs = sum(_sleeps(pid)) - before, len(told) - 1
    return {
        "wake_ups": wake_ups,
        "watchdogs": watchdogs,
        "other_wake_ups": wake_ups - watchdogs,
    }


def _sleeps(pid: str) -> Iterator[int]:
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        yield int(lines["voluntary_ctxt_switches"])


def _moments_us(unit: str, *moments: str) -> list[int]:
    """Of a unit, by systemd's monotonic clock."""
    shown = [f"--property={moment}TimestampMonotonic" for moment in moments]
    lines = run("systemctl", "show", *shown, unit).splitlines()
    values = dict(line.split("=", 1) for line in lines)
    return [int(values[f"{moment}TimestampMonotonic"]) for moment in moments]
