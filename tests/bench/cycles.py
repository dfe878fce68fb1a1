"""One medium, plugged and pulled under each system in turn, with the measured times.

A system runs alone while it is measured: it is started, serves the medium once without being
measured, then several times measured, and is stopped. Then the next system has its turn. Every
second round is in reverse order. Leftovers of a system are noted, and removed before the next
cycle.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from bench.luks import luks_cartridge
from bench.systems import CGROUP, LABEL, SYSTEMS, System, cpu_s, memory_kib
from bench.turns import Sample, Samples, Wrong, in_turns, shown
from bench.watcher import GONE, Watcher
from kernel.cartridges import HELLO, TEXT, Cartridge, cartridges
from kernel.witness import run

WHOLE_GUEST: Final = Path("/sys/fs/cgroup")


def measured(system: System, watcher: Watcher, medium: Cartridge) -> Sample:
    """Plug the medium, wait for its mount, pull it, and wait until nothing of it is left.

    Returns: milliseconds and KiB, and what was `left`; None stands for what never happened.

    Raises: NothingHappenedError; Wrong.
    """
    point = system.point(LABEL)
    own, guest = cpu_s(CGROUP), cpu_s(WHOLE_GUEST)
    up = watcher.arrival(medium.plug, [point])
    watcher.settle()
    if (point / HELLO).read_bytes() != TEXT:
        raise Wrong(f"what is mounted at {point} is not the medium")
    # Without a service, the measured programs are those that an event happens to have started.
    memory = memory_kib() if system.units else {"Rss": 0, "Pss": 0}
    down = watcher.departure(medium.pull, system.stays)
    watcher.settle()
    own, guest = cpu_s(CGROUP) - own, cpu_s(WHOLE_GUEST) - guest
    left = [moment.removesuffix(" gone") for moment in GONE if moment not in down]
    if left:
        remove_leftovers([point])
    gone = {moment: down[moment] - down["kernel remove"] for moment in GONE if moment in down}
    last = max(gone.values(), default=None)
    seconds = {
        "plugged_to_kernel_add": up["kernel add"] - up["plugged"],
        "kernel_add_to_udev_add": up["udev add"] - up["kernel add"],
        "kernel_add_to_mounted": up["mounted"] - up["kernel add"],
        "udev_add_to_mounted": up["mounted"] - up["udev add"],
        "removed_to_unmounted": gone.get("mount gone"),
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


def remove_leftovers(points: Iterable[Path]) -> None:
    """Remove all mounts, mappings and mount points of the media."""
    for point in points:
        while point.is_mount():
            run("umount", "--lazy", str(point))
    for mapping in run("dmsetup", "ls").splitlines():
        name, tab, _ = mapping.partition("\t")
        if tab:
            run("dmsetup", "remove", "--retry", "--force", name)
    for point in points:
        if point.exists():
            point.rmdir()


def cycles(systems: Sequence[str], count: int, warm_ups: int = 1) -> Samples:
    """Let each system serve the medium this many times, after warm-up cycles in each of its turns.

    Raises: NothingHappenedError; Wrong. The system's journal is shown then.
    """
    with ExitStack() as held:
        media = {False: held.enter_context(cartridges([LABEL]))[0]}
        if any(SYSTEMS[name].container for name in systems):
            media[True] = held.enter_context(luks_cartridge(LABEL))
        watcher = held.enter_context(closing(Watcher()))

        def turn(name: str, cycles: int) -> list[Sample]:
            system = SYSTEMS[name]
            medium = media[system.container]
            with system.running(), shown(name), pulled(medium):
                found = [measured(system, watcher, medium) for _ in range(warm_ups + cycles)]
                return found[warm_ups:]

        return in_turns(systems, count, turn)


@contextmanager
def pulled(medium: Cartridge) -> Iterator[None]:
    """Pull the medium afterwards, whatever happened."""
    try:
        yield
    finally:
        if medium.is_plugged:
            medium.pull()
