"""Many media: all at once, and one that arrives beside many others.

Disks are scsi_debug's, which the guest plugs itself. Sticks are QEMU's, which only the host can
plug: it reads requests from a pipe (`vm/bench.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Final

from bench.cycles import remove_leftovers
from bench.systems import BLOBS, LABEL, PROGRAMS, SYSTEMS, System
from bench.turns import Sample, Samples, in_turns, shown
from bench.watcher import GONE, Watcher, mappings
from fakes.contract import until
from kernel.cartridges import Cartridge, cartridges

MANY: Final = ("L", "agent", "S", "P")
"""Systems that serve any number of media."""
SCALED: Final = ("L", "agent")
REQUESTS: Final = PROGRAMS / "requests"
"""The pipe; the requests are `plug`, `pull` and `end`."""
SIZE_MB: Final = 4
WITHIN_S: Final = 300


def storms(systems: Sequence[str], count: int, sticks: int, disks: int) -> Samples:
    """Run this many storms of sticks and of disks under each system. Raises: Wrong and so on."""
    with ExitStack() as held:
        media = held.enter_context(_disks(disks))
        watcher = held.enter_context(closing(Watcher()))
        held.callback(_request, "end")

        def turn(name: str, _: int) -> list[Sample]:
            system = SYSTEMS[name]
            with system.running(), shown(name):
                of_sticks = _storm(
                    system, watcher, sticks, lambda: _request("plug"), lambda: _request("pull")
                )
                of_disks = _storm(
                    system, watcher, disks, lambda: _plug(media), lambda: _pull(media)
                )
            return [
                {
                    "sticks_to_mounted": of_sticks[0],
                    "disks_to_mounted": of_disks[0],
                    "disks_to_nothing_left": of_disks[1],
                }
            ]

        return in_turns([name for name in systems if name in MANY], count, turn, in_a_turn=1)


def _storm(
    system: System,
    watcher: Watcher,
    size: int,
    plug: Callable[[], None],
    pull: Callable[[], None],
) -> tuple[float, float | None]:
    """Return milliseconds from the first event to the last mount, and until nothing was left."""
    points = [system.point(label) for label in labels(size)]
    up = watcher.arrival(plug, points)
    watcher.settle()
    down = watcher.departure(pull, system.stays)
    watcher.settle()
    mounted = (up["mounted"] - up["kernel add"]) * 1000
    if any(moment not in down for moment in GONE):
        remove_leftovers(points)
        return mounted, None
    return mounted, (max(down[moment] for moment in GONE) - down["kernel remove"]) * 1000


def scaling(systems: Sequence[str], count: int, disks: int, warm_ups: int = 1) -> Samples:
    """Measure the time until a medium is mounted beside none, a quarter, and all of the others."""
    with ExitStack() as held:
        media = held.enter_context(_disks(disks))
        watcher = held.enter_context(closing(Watcher()))
        places = {"first": 0, "sixteenth": max(1, disks // 4) - 1, "last": disks - 1}

        def turn(name: str, arrivals: int) -> list[Sample]:
            system = SYSTEMS[name]
            samples: list[Sample] = [{} for _ in range(arrivals)]
            with system.running(), shown(name):
                _arrivals(system, watcher, media[0], warm_ups)
                there = 0
                for place, others in places.items():
                    _add(system, watcher, media[there:others])
                    there = max(there, others)
                    took = _arrivals(system, watcher, media[others], arrivals)
                    for sample, one in zip(samples, took, strict=True):
                        sample[place] = one
                _remove(media[:there], [system.point(label) for label in labels(there)])
            return samples

        return in_turns([name for name in systems if name in SCALED], count, turn)


def _add(system: System, watcher: Watcher, media: Sequence[Cartridge]) -> None:
    """Plug these media and wait until they are mounted."""
    if media:
        watcher.arrival(lambda: _plug(media), [system.point(medium.label) for medium in media])
        watcher.settle()


def _remove(media: Sequence[Cartridge], points: Sequence[Path]) -> None:
    """Pull these media and wait until nothing of them is left. Raises: AssertionError."""
    _pull(media)
    until(lambda: not mappings() and not any(map(Path.exists, points)), within_s=WITHIN_S)


def _arrivals(system: System, watcher: Watcher, medium: Cartridge, count: int) -> list[float]:
    """Plug and pull the medium this many times. Returns: milliseconds to its mount, each time."""
    took = []
    for _ in range(count):
        up = watcher.arrival(medium.plug, [system.point(medium.label)])
        watcher.settle()
        watcher.departure(medium.pull, system.stays)
        watcher.settle()
        took.append((up["mounted"] - up["kernel add"]) * 1000)
    return took


def labels(count: int) -> list[str]:
    """Return the labels of this many media."""
    return [f"cartridge-{number:02}" for number in range(1, count + 1)]


@contextmanager
def _disks(count: int) -> Iterator[list[Cartridge]]:
    """Make this many media, all out of their sockets, and a blob for each."""
    with ExitStack() as held:
        for label in labels(count):
            if label != LABEL:
                blob = BLOBS / f"{label}.bb"
                held.callback(blob.unlink)
                shutil.copy(BLOBS / f"{LABEL}.bb", blob)
        yield held.enter_context(cartridges(labels(count), size_mb=SIZE_MB))


def _plug(media: Sequence[Cartridge]) -> None:
    for medium in media:
        medium.plug()


def _pull(media: Sequence[Cartridge]) -> None:
    for medium in media:
        medium.pull()


def _request(text: str) -> None:
    """Send the request to the host, which fulfils it later."""
    REQUESTS.write_text(text)
