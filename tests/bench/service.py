"""The service itself: the time until it is ready, and its activity while nothing happens."""

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
CHECK_INTERVAL_S: Final = 1
"""The watchdog is pinged less often."""


def bare() -> System:
    """Return a script that is ready as early as Python permits, with the agent's settings."""
    service, _, _ = INSTALLED.read_text().partition("[Service]")[2].partition("[Install]")
    settings = [line for line in service.splitlines() if not line.startswith("Exec")]
    command = f"ExecStart=/usr/bin/python3 -I {HERE}/bare.py"
    unit = "\n".join(["[Service]", f"Slice={SLICE}", command, *settings, ""])
    return System(
        "asyncio and pyudev imported, a monitor opened, READY said", (BARE_UNIT,), {BARE_UNIT: unit}
    )


def starts(systems: dict[str, System], count: int) -> Samples:
    """Start each service this many times; measure the time until it is ready."""

    def turn(name: str, _: int) -> list[Sample]:
        with systems[name].running(), shown(name):
            unit = systems[name].units[0]
            begun, ready = _moments_us(unit, "ExecMainStart", "ActiveEnter")
            return [{"exec_to_ready": (ready - begun) / 1000, "ready_rss_kib": memory_kib()["Rss"]}]

    return in_turns(list(systems), count, turn, in_a_turn=1)


def idle(minutes: int, seconds: float) -> Samples:
    """Measure the agent's activity in minutes of this many seconds, with a medium mounted."""
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
    """Count how often a thread of the agent was woken, and the watchdog pinged.

    A thread that was woken sleeps again, which is what the kernel counts: proc(5), status.
    """
    pid = run("systemctl", "show", "--property=MainPID", "--value", AGENT).strip()
    pings = set(_moments_us(AGENT, "Watchdog"))
    before = sum(_sleeps(pid))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(CHECK_INTERVAL_S)
        pings.update(_moments_us(AGENT, "Watchdog"))
    wake_ups, watchdogs = sum(_sleeps(pid)) - before, len(pings) - 1
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
    """Return moments of a unit, by systemd's monotonic clock."""
    shown = [f"--property={moment}TimestampMonotonic" for moment in moments]
    lines = run("systemctl", "show", *shown, unit).splitlines()
    values = dict(line.split("=", 1) for line in lines)
    return [int(values[f"{moment}TimestampMonotonic"]) for moment in moments]
