"""Latencies of what must be quick, measured in the guest; nothing here is asserted."""

from __future__ import annotations

import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fakes.contract import until
from kernel.agents import ARRIVAL, Room, tables
from kernel.cartridges import Cartridge, Faulty
from kernel.forked import Stop
from kernel.holders import hold_open, process, write_on

PROBED_AFTER: Final = ARRIVAL.index("dm resume") + 1
"""Number of calls of an arrival up to the one that makes the mapping live; the probe follows."""
KERNEL_GROUP: Final = 1
NETLINK_KOBJECT_UEVENT: Final = 15
"""From linux/netlink.h; Python has no name for it."""


def after_the_removal(room: Room, count: int) -> dict[str, list[float]]:
    """Measure the seconds from the kernel's remove event until no crypt table is left.

    Results are by how the mount is used. The event is the partition's, at the time when a listener
    receives it. Reading the tables again and again takes the agent some of its time.
    """
    room.agent.start()
    found: dict[str, list[float]] = {}
    for _ in range(count):
        for hold in (hold_open, write_on):
            room.plug_and_check()
            with process(hold, room.point()):
                with removal_of(Path(room.medium.partition).name) as removed:
                    room.medium.pull()
                    until(lambda: not _crypt_tables(room.medium), every_s=0.002)
                    gone = time.monotonic()
                found.setdefault(hold.__name__, []).append(gone - removed())
            room.wait_until_released()
    room.agent.stop()
    return found


def _crypt_tables(medium: Cartridge) -> bool:
    return any(" crypt " in line for line in tables(medium.label))


@contextmanager
def removal_of(name: str) -> Iterator[Callable[[], float]]:
    """Yield, and afterwards wait for the kernel's event that the block device was removed."""
    removed: list[float] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT) as events:
        events.bind((0, KERNEL_GROUP))
        events.settimeout(60)

        def listen() -> None:
            while True:
                event = events.recv(65536)
                if event.startswith(b"remove@") and event.split(b"\0")[0].endswith(name.encode()):
                    removed.append(time.monotonic())
                    return

        listener = threading.Thread(target=listen)
        listener.start()
        yield lambda: removed[0]
        listener.join()


def beside_a_hung_medium(room: Room, count: int) -> dict[str, list[float]]:
    """Measure seconds from plug to mount, with another medium hung, and without."""
    found: dict[str, list[float]] = {"beside a hung medium": [], "without": []}
    with Faulty("cartridge-03", room.medium.contents) as faulty:
        for _ in range(count):
            room.agent.start(Stop(PROBED_AFTER))
            with faulty.plugged():
                room.agent.until_called(PROBED_AFTER)
                with faulty.hung():
                    room.agent.go_on()
                    room.agent.until_said("cartridge-03.*: stuck: ")
                    found["beside a hung medium"] += arrivals(room)
                until((room.mount_root / faulty.label).is_mount)
                found["without"] += arrivals(room)
                room.agent.stop()
    return found


def arrivals(room: Room) -> list[float]:
    """Measure the seconds of some arrivals, after one that does not count."""
    took = []
    for _ in range(5):
        room.agent.forget()
        begun = time.monotonic()
        room.medium.plug()
        room.agent.until_said(f"{room.medium.label}.*: mounted: at ")
        took.append(time.monotonic() - begun)
        room.pull_and_check()
    return took[1:]


def formatted(seconds: list[float]) -> str:
    """Format the figures, in milliseconds."""
    median, worst = statistics.median(seconds), max(seconds)
    return f"median {median * 1000:.0f} ms, at most {worst * 1000:.0f} ms, n = {len(seconds)}"
