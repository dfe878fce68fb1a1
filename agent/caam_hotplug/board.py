"""The published state of every volume, and who is told of it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from caam_hotplug.model import State, Volume, VolumeId

log = logging.getLogger(__name__)

_LEVELS = {
    State.FAILED: logging.ERROR,
    State.STUCK: logging.ERROR,
    State.CONFLICT: logging.WARNING,
    State.WAITING: logging.WARNING,
    State.REMOVED_UNSAFELY: logging.WARNING,
}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is true of one volume."""

    volume: Volume
    state: State
    reason: str


class Board:
    """Every volume that is present, and those that left unsafely until the next one arrives.

    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self._entries: dict[VolumeId, Entry] = {}
        self._listeners: list[Callable[[Entry], None]] = []

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """The listener is called with every entry that is published from now on."""
        self._listeners.append(listener)

    def entries(self) -> list[Entry]:
        """All entries, in the order of their arrival."""
        return list(self._entries.values())

    def publish(self, volume: Volume, state: State, reason: str) -> None:
        """The volume's state is this, and everyone who listens knows."""
        entry = Entry(volume, state, reason)
        if entry == self._entries.get(volume.id):
            return
        if volume.id not in self._entries and state is not State.GONE:
            self._forget_departed()
        if state is State.GONE:
            self._entries.pop(volume.id, None)
        else:
            self._entries[volume.id] = entry
        said = f"{state.value}: {reason}" if reason else state.value
        log.log(_LEVELS.get(state, logging.INFO), "%s: %s", volume, said)
        for listener in self._listeners:
            listener(entry)

    def summary(self) -> str:
        """How many volumes are in which state, for the service's status line."""
        counts = Counter(entry.state for entry in self._entries.values())
        shown = [state for state in State if counts[state] and state is not State.IGNORED]
        return ", ".join(f"{counts[state]} {state.value}" for state in shown) or "no media"

    def _forget_departed(self) -> None:
        for key, entry in list(self._entries.items()):
            if entry.state is State.REMOVED_UNSAFELY:
                del self._entries[key]
