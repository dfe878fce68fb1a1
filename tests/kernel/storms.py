"""Many media at once, again and again."""

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


def is_as_it_should(room: Room) -> bool:
    """Whether every medium that is plugged is mounted, and nothing is there of any other.

    What the agent says is read meanwhile: it would wait for a reader of a full pipe.
    """
    room.agent.forget()
    plugged = {medium.label for medium in room.media if medium.is_plugged}
    there = {path.name for path in room.mount_root.iterdir()}
    if there != plugged or len(mappings()) != len(plugged) or keys():
        return False
    points = [room.mount_root / label / HELLO for label in plugged]
    return all(point.exists() and point.read_bytes() == TEXT for point in points)


@contextmanager
def said_at_a_bad_end(room: Room, say: Callable[[str], None]) -> Iterator[None]:
    """If it comes to a bad end, what the agent said is said."""
    try:
        yield
    except BaseException:
        say(f"what the agent said:\n{room.agent.everything()}")
        raise


def storms(count: int, size: int, say: Callable[[str], None]) -> list[tuple[float, float]]:
    """So many media were plugged at once and pulled at once, so often. Raises: AssertionError.

    Returns: seconds from the first plug until all were mounted, and from the first pull until
    nothing was left, of each storm.
    """
    labels = [f"cartridge-{number:02}" for number in range(1, size + 1)]
    took: list[tuple[float, float]] = []
    with (
        cartridges(labels, size_mb=SIZE_MB) as media,
        room_of(media) as room,
        said_at_a_bad_end(room, say),
    ):
        room.agent.start()
        for number in range(1, count + 1):
            begun = time.monotonic()
            for medium in media:
                medium.plug()
            until(lambda: all(medium.is_plugged for medium in media))
            until(lambda: is_as_it_should(room), within_s=WITHIN_S)
            mounted = time.monotonic()
            for medium in media:
                medium.pull()
            until(lambda: is_as_it_should(room), within_s=WITHIN_S)
            took.append((round(mounted - begun, 1), round(time.monotonic() - mounted, 1)))
            say(f"storm {number} of {count}: {size} media mounted in {took[-1][0]} s, "
                f"gone in {took[-1][1]} s")  # fmt: skip
    return took
