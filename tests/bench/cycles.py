"""Plugs and pulls one medium under each system in turn, and writes down what was seen.

    python3 -m bench.cycles --systems agent,L --cycles 12 REPORT

Runs in the guest, as root, with nothing else that would serve the medium; `vm/bench.py` prepares
that. A system runs alone while it is measured: it is started, serves the medium once without being
measured, then some times with, and is stopped. Then it is the next one's turn; every second round
goes backwards. What a system leaves behind is noted, and taken away before the next cycle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from bench.luks import luks_cartridge
from bench.systems import (
    CGROUP,
    LABEL,
    MOUNT_ROOT,
    SLICE,
    SYSTEMS,
    System,
    cpu_s,
    memory_kib,
)
from bench.watcher import GONE, NothingHappenedError, Watcher
from kernel.cartridges import HELLO, TEXT, Cartridge, cartridges
from kernel.witness import run

IN_A_TURN: Final = 3
WHOLE_GUEST: Final = Path("/sys/fs/cgroup")

Cycle = dict[str, Any]
"""What was measured of a medium that came and went, in milliseconds and KiB, and what was `left`.

None stands for what never came.
"""


class Wrong(Exception):  # noqa: N818  a medium was served in a wrong way, which is no figure
    """A system has not served the medium as it should."""


def measured(system: System, watcher: Watcher, medium: Cartridge) -> Cycle:
    """The medium was plugged, mounted, pulled, and nothing of it is left.

    Raises: NothingHappenedError; Wrong.
    """
    point = system.point(LABEL)
    own, guest = cpu_s(CGROUP), cpu_s(WHOLE_GUEST)
    up = watcher.arrival(medium.plug, point)
    watcher.settle()
    if (point / HELLO).read_bytes() != TEXT:
        raise Wrong(f"what is mounted at {point} is not the medium")
    memory = memory_kib()
    down = watcher.departure(medium.pull, system.stays)
    watcher.settle()
    own, guest = cpu_s(CGROUP) - own, cpu_s(WHOLE_GUEST) - guest
    left = [moment.removesuffix(" gone") for moment in GONE if moment not in down]
    if left:
        take_away(point)
    gone = {moment: down[moment] - down["kernel remove"] for moment in GONE if moment in down}
    last = max(gone.values(), default=None)
    seconds = {
        "plugged_to_kernel_add": up["kernel add"] - up["plugged"],
        "kernel_add_to_udev_add": up["udev add"] - up["kernel add"],
        "kernel_add_to_mounted": up["mounted"] - up["kernel add"],
        "udev_add_to_mounted": up["mounted"] - up["udev add"],
        "removed_to_unmounted": gone.get("unmounted"),
        "removed_to_mapping_gone": gone.get("mapping gone"),
        "removed_to_key_gone": gone.get("key gone"),
        "removed_to_nothing_left": None if left else last,
        "removed_to_rest_gone": last,
        "own_cpu": own,
        "guest_cpu": guest,
    }
    figures = {
        name: None if value is None else round(value * 1000, 3) for name, value in seconds.items()
    }
    return {**figures, "rss_kib": memory["Rss"], "pss_kib": memory["Pss"], "left": left}


def take_away(point: Path) -> None:
    """No mount, mapping and mount point of the medium is there."""
    while point.is_mount():
        run("umount", "--lazy", str(point))
    for name in run("dmsetup", "info", "-c", "--noheadings", "-o", "name").split("\n"):
        if name and name != "No devices found":
            run("dmsetup", "remove", "--retry", "--force", name)
    if point.exists():
        point.rmdir()


def turn(system: System, count: int, watcher: Watcher, medium: Cartridge) -> list[Cycle]:
    """The system has served the medium so often, and once before. It is gone again.

    Raises: NothingHappenedError; Wrong. What the journal has of it is shown.
    """
    with system.running():
        try:
            return [measured(system, watcher, medium) for _ in range(count + 1)][1:]
        except (NothingHappenedError, Wrong) as error:
            journal = run("journalctl", "-n", "30", "--no-pager")
            print(f"{system.what}: {error}\n{journal}", flush=True)
            raise
        finally:
            if medium.is_plugged:
                medium.pull()
                watcher.settle()


def rounds(cycles: int) -> list[int]:
    """How many cycles each system has in each of its turns."""
    return [min(IN_A_TURN, cycles - done) for done in range(0, cycles, IN_A_TURN)]


def main() -> int:
    """Writes the report as JSON. Returns: the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m bench.cycles", description=__doc__)
    parser.add_argument("--systems", default=",".join(SYSTEMS), type=_systems)
    parser.add_argument("--cycles", default=12, type=int)
    parser.add_argument("report", type=Path)
    options = parser.parse_args()
    found: dict[str, list[Cycle]] = defaultdict(list)
    with ExitStack() as held:
        # Started, so that it stays with its count of processor time when nothing runs in it.
        run("systemctl", "start", SLICE)
        held.callback(run, "systemctl", "stop", SLICE)
        media = {False: held.enter_context(cartridges([LABEL]))[0]}
        if any(SYSTEMS[name].container for name in options.systems):
            media[True] = held.enter_context(luks_cartridge(LABEL))
        MOUNT_ROOT.mkdir(mode=0o755, exist_ok=True)
        watcher = Watcher()
        held.callback(watcher.close)
        for number, count in enumerate(rounds(options.cycles)):
            order = options.systems if number % 2 == 0 else options.systems[::-1]
            for name in order:
                system = SYSTEMS[name]
                found[name] += turn(system, count, watcher, media[system.container])
                print(f"{name}: {len(found[name])} of {options.cycles} cycles", flush=True)
    report = {
        "machine": machine(),
        "systems": {
            name: {"what": SYSTEMS[name].what, "cycles": found[name]} for name in options.systems
        },
    }
    options.report.write_text(json.dumps(report))
    return 0


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpus": os.cpu_count(),
    }


def _systems(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SYSTEMS]:
        raise argparse.ArgumentTypeError(
            f"no system is called {unknown[0]!r}; there are {', '.join(SYSTEMS)}"
        )
    return list(dict.fromkeys(names))


if __name__ == "__main__":
    sys.exit(main())
