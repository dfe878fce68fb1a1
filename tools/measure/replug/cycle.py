"""One cycle: the medium is pulled, plugged and mounted again, and each step has its time."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.kernel import uevents
from measure.replug import agent as agents
from measure.replug.agent import Agent
from measure.replug.medium import Medium, is_mounted
from measure.replug.slot import Replugger
from measure.replug.watch import ENDS_WITHIN_S, Awaited, Watch
from measure.running import MeasureError

QUEUE: Final = Path("/run/udev/queue")
"""There while udevd has events to handle (udev_queue_get_queue_is_empty in libudev)."""
LOOK_EVERY_S: Final = 0.001

GONE: Final = ("unmounted", "mapping gone", "key gone", "mount point gone")
SPANS: Final = (
    ("plugged", "kernel add"),
    ("kernel add", "udev add"),
    ("kernel add", "mounted"),
    ("udev add", "mounted"),
    *(("removed", end) for end in (*GONE, "nothing left")),
)
"""From one moment to another."""


def cycle(
    agent: Agent, medium: Medium, watch: Watch, replugger: Replugger
) -> tuple[Medium, dict[str, float]]:
    """Pull the medium and plug it again.

    Returns: the medium as it is there now, and what was measured. Raises: HotplugError; OSError.
    """
    medium.require_unused(replugger.slot)
    os.sync()
    cpu_s = agent.cpu_s
    moments = _pull(medium, watch, replugger)
    settle()
    moments |= _plug(medium, watch, replugger)
    settle()
    cpu_s = agent.cpu_s - cpu_s
    now = agents.ask(f"/dev/{watch.name}")
    if now.pid != agent.pid:
        raise MeasureError("the agent was started anew meanwhile; try again")
    sample = spans(moments) | {"agent's CPU, ms": cpu_s * 1000}
    sample |= {f"agent's {name.upper()}, MB": agent.memory_mb()[name] for name in ("Rss", "Pss")}
    sample |= {f"  {step}, ms": took * 1000 for step, took in now.volume.steps_s.items()}
    rounded = {title: round(value, 3) for title, value in sample.items()}
    return Medium.find(watch.name, medium.point), rounded


def _pull(medium: Medium, watch: Watch, replugger: Replugger) -> dict[str, float]:
    """Pull it. Returns: the moments from its removal until nothing of it is left."""
    name = medium.volume.name
    there = {part: has_gone for part, has_gone in medium.parts().items() if not has_gone()}
    awaited = Awaited(lambda event: event.name == name, ["kernel remove"], there, LOOK_EVERY_S)
    seen = watch.moments(replugger, replugger.pull, awaited)
    removed = seen["kernel remove"]
    gone = {part: seen.get(part, removed) for part in GONE}  # what had gone before took no time
    return gone | {"removed": removed, "nothing left": max(gone.values())}


def _plug(medium: Medium, watch: Watch, replugger: Replugger) -> dict[str, float]:
    """Plug it. Returns: the moments until it is mounted.

    By hand, nobody knows the moment at which it was plugged.
    """
    partition = str(medium.volume.id.partition)
    folder = replugger.slot.folder if replugger.slot else Path("/sys/devices")

    def is_its(event: uevents.Uevent) -> bool:
        place = Path(f"/sys{event.properties.get('DEVPATH', '')}")
        return event.properties.get("PARTN", "0") == partition and folder in place.parents

    events = ["kernel add", "udev add"] if names.UDEV_CONTROL.exists() else ["kernel add"]
    mounted = {"mounted": lambda: is_mounted(medium.point)}
    moments = watch.moments(replugger, replugger.plug, Awaited(is_its, events, mounted, 1))
    begun = moments.pop("begun")
    return moments if replugger.slot is None else moments | {"plugged": begun}


def spans(moments: Mapping[str, float]) -> dict[str, float]:
    """Subtract the moments, and find udev's share; none from or to what there was not."""
    found = {
        f"{begin} -> {end}, ms": (moments[end] - moments[begin]) * 1000
        for begin, end in SPANS
        if {begin, end} <= moments.keys()
    }
    if "udev add" in moments:
        share = found["kernel add -> udev add, ms"] / found["kernel add -> mounted, ms"]
        found["udev's share of kernel add -> mounted"] = share
    return found


def settle() -> None:
    """Wait until udevd has nothing more to do. Raises: MeasureError."""
    end = time.monotonic() + ENDS_WITHIN_S
    while QUEUE.exists():
        if time.monotonic() > end:
            raise MeasureError(
                f"udevd is busy after {ENDS_WITHIN_S} s; `udevadm monitor` shows with what"
            )
        time.sleep(0.02)
