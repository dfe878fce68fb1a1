"""Systems take turns, so that a drift in the guest affects all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

from bench.watcher import NothingHappenedError
from kernel.witness import run

IN_A_TURN: Final = 3

Sample = dict[str, Any]
"""Values of one measurement, by the columns' keys; None for what never came."""

Samples = dict[str, list[Sample]]
"""Samples of each system."""


class Wrong(Exception):  # noqa: N818  a medium was served in a wrong way, which is no figure
    """A system has served the medium in a wrong way."""


def in_turns(
    systems: Sequence[str],
    count: int,
    turn: Callable[[str, int], list[Sample]],
    *,
    in_a_turn: int = IN_A_TURN,
) -> Samples:
    """Collect this many samples of each system; every second round is in reverse order.

    `turn` takes some of a system's samples at a time.
    """
    found: Samples = {name: [] for name in systems}
    for number, size in enumerate(rounds(count, in_a_turn)):
        for name in systems if number % 2 == 0 else reversed(systems):
            found[name] += turn(name, size)
            print(f"{name}: {len(found[name])} of {count}", flush=True)
    return found


def rounds(count: int, in_a_turn: int = IN_A_TURN) -> list[int]:
    """Return the number of samples that each system has in each of its turns."""
    return [min(in_a_turn, count - done) for done in range(0, count, in_a_turn)]


@contextmanager
def shown(name: str) -> Iterator[None]:
    """Show the journal if the system fails."""
    try:
        yield
    except (NothingHappenedError, Wrong) as error:
        journal = run("journalctl", "-n", "30", "--no-pager")
        print(f"{name}: {error}\n{journal}", flush=True)
        raise
