"""Many media at once, several times."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from fakes.contract import until
from kernel.agents import Room, keys, mappings, room_of
from kernel.cartridges import HELLO, TEXT, cartridges

SIZE_MB: Final = 4
WITHIN_S: Final = 600


def all_present_are_mounted(room: Room) -> bool:
    """Whether every plugged medium is mounted, and nothing exists of any other.

    This also reads the agent's log: the agent would block on a full pipe.
    """
    room.agent.forget()
    plugged = {medium.label for medium in room.media if medium.is_plugged}
    there = {path.name for path in room.mount_root.iterdir()}
    if there != plugged or len(mappings()) != len(plugged) or keys():
        return False
    points = [room.mount_root / label / HELLO for label in plugged]
    return all(point.exists() and point.read_bytes() == TEXT for point in points)


@contextmanager
def log_shown_on_failure(room: Room, say: Callable[[str], None]) -> Iterator[None]:
    """Print the agent's log if the block raises."""
    try:
        yield
    except BaseException:
        say(f"log of the agent:\n{room.agent.everything()}")
        raise


def storms(count: int, size: int, say: Callable[[str], None]) -> list[tuple[float, float]]:
    """Plug and pull many media at once, this many times. Raises: AssertionError.

    Returns: for each storm, seconds from the first plug until all were mounted, and from the first
    pull until nothing was left.
    """
    labels = [f"cartridge-{number:02}" for number in range(1, size + 1)]
    took: list[tuple[float, float]] = []
    with (
        cartridges(labels, size_mb=SIZE_MB) as media,
        room_of(media) as room,
        log_shown_on_failure(room, say),
    ):
        room.agent.start()
        for number in range(1, count + 1):
            begun = time.monotonic()
            for medium in media:
                medium.plug()
            until(lambda: all(medium.is_plugged for medium in media))
            until(lambda: all_present_are_mounted(room), within_s=WITHIN_S)
            mounted = time.monotonic()
            for medium in media:
                medium.pull()
            until(lambda: all_present_are_mounted(room), within_s=WITHIN_S)
            took.append((round(mounted - begun, 1), round(time.monotonic() - mounted, 1)))
            say(f"storm {number} of {count}: {size} media mounted in {took[-1][0]} s, "
                f"gone in {took[-1][1]} s")  # fmt: skip
    return took
