"""The published status of every volume, and those who listen to its changes."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from caam_hotplug.model import Entry, State, VolumeId
from caam_hotplug.systemd import journal

log = logging.getLogger(__name__)

_LEVELS = {
    State.FAILED: logging.ERROR,
    State.STUCK: logging.ERROR,
    State.CONFLICT: logging.WARNING,
    State.WAITING: logging.WARNING,
    State.REMOVED_UNSAFELY: logging.WARNING,
}
_SHOWN: Final = [state.value for state in State if state is not State.IGNORED]


class StatusRegistry:
    """Every volume that is present, and those removed unsafely until the next one arrives.

    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self._entries: dict[VolumeId, Entry] = {}
        self._listeners: list[Callable[[Entry], None]] = []
        self.counters: Counter[str] = Counter()
        """How often a volume came to each state, by the state's name."""

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """Call the listener with every entry that is published from now on."""
        self._listeners.append(listener)

    def entries(self) -> list[Entry]:
        """Return all entries, in the order of their arrival."""
        return list(self._entries.values())

    def entry(self, which: VolumeId) -> Entry | None:
        """Return the entry of a volume."""
        return self._entries.get(which)

    def publish(self, entry: Entry) -> None:
        """Replace the entry of the volume, log its state, and call the listeners."""
        volume, state = entry.volume, entry.state
        before = self._entries.get(volume.id)
        same = before is not None and (before.state, before.reason) == (state, entry.reason)
        entry = replace(entry, since=before.since if same and before else time.time())
        if entry == before:
            self._entries[volume.id] = entry  # seen later than the one before
            return
        if before is None and state is not State.GONE:
            self._forget_departed()
        if state is State.GONE:
            self._entries.pop(volume.id, None)
        else:
            self._entries[volume.id] = entry
        if not same:
            self.counters[state.value] += 1
            said = f"{state.value}: {entry.reason}" if entry.reason else state.value
            extra = journal.published(entry)
            log.log(_LEVELS.get(state, logging.INFO), "%s: %s", volume, said, extra=extra)
        for listener in self._listeners:
            listener(entry)

    def summary(self) -> str:
        """Return how many volumes are in which state, for the status line of the service."""
        counts = Counter(entry.state.value for entry in self._entries.values())
        shown = [state for state in _SHOWN if state in counts]
        return ", ".join(f"{counts[state]} {state}" for state in shown) or "no media"

    def _forget_departed(self) -> None:
        for key, entry in list(self._entries.items()):
            if entry.state is State.REMOVED_UNSAFELY and not entry.is_parked:
                del self._entries[key]
