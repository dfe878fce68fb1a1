"""The published status of every volume, and those who listen to its changes."""

from __future__ import annotations

import asyncio
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
_RELEASE_S: Final = 0.1
"""Longer than most releases."""
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
        self._waiting: list[Entry] = []
        """What is to be published, in its order."""
        self._releasing: set[VolumeId] = set()
        """Volumes whose release has begun; that is not published yet."""
        self._timer: asyncio.TimerHandle | None = None

    def listen(self, listener: Callable[[Entry], None]) -> None:
        """Call the listener with every entry that is published from now on."""
        self._listeners.append(listener)

    def entries(self) -> list[Entry]:
        """Return all entries, in the order of their arrival."""
        return list(self._entries.values())

    def entry(self, which: VolumeId) -> Entry | None:
        """Return the entry of a volume."""
        return self._entries.get(which)

    def publish_soon(self, entry: Entry) -> None:
        """Publish the entry a turn of the loop later: the volume's next operation has begun then.

        That a release has begun waits for what the volume comes to, or a moment, and so do entries
        of others after it: the journal and the bus would hold up the release.
        """
        which = entry.volume.id
        self._waiting.append(entry)
        if entry.state is State.DETACHING:
            self._releasing.add(which)
        elif not self._releasing or which in self._releasing:
            self._publish_waiting()
        if self._waiting and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(_RELEASE_S, self._publish_waiting)

    def _publish_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._releasing.clear()
        waiting, self._waiting = self._waiting, []
        for entry in waiting:
            asyncio.get_running_loop().call_soon(self.publish, entry)

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
