"""The published status of one volume, also while an operation takes long."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from caam_hotplug.model import Entry, State, Volume

Publish = Callable[[Entry], None]


def with_loss(words: str, lost: str) -> str:
    """Return the words, and what could not be written, unless they say it."""
    return words if not lost or lost in words else f"{words}; {lost}"


class VolumeStatus:
    """State, reason and facts of a volume, published at each change. Synchronization: loop only."""

    def __init__(self, volume: Volume, publish: Publish) -> None:
        self.volume = volume
        """The volume as it is known now; part of the next entry that is published."""
        self.late: str | None = None
        """Why the operation under way takes longer than it should, or None."""
        self._publish = publish
        self._entry: Entry | None = None

    @property
    def state(self) -> State | None:
        """The last state, whether or not an operation takes long."""
        return None if self._entry is None else self._entry.state

    @property
    def words(self) -> str:
        """State and reason."""
        return "" if self._entry is None else f"{self._entry.state.value}: {self._entry.reason}"

    @property
    def reason(self) -> str:
        """Reason of the state."""
        return "" if self._entry is None else self._entry.reason

    @property
    def blob(self) -> str:
        """Path of the blob that the volume needs; empty if no rule matches it."""
        return "" if self._entry is None else self._entry.blob

    def publish(self, state: State, reason: str = "", **facts: Any) -> None:
        """Publish a state; facts that are not named stay as they were."""
        now = self._entry or Entry(self.volume, state)
        facts = {"is_parked": False, "observed_at": time.time(), **facts}
        self._entry = replace(now, volume=self.volume, state=state, reason=reason, **facts)
        self._publish(self._entry)

    def publish_facts(self, **facts: Any) -> None:
        """Publish the present state with other facts."""
        if self._entry is not None:
            self.publish(self._entry.state, self._entry.reason, **facts)

    def note_look(self) -> None:
        """Publish that the kernel has what is published, as of now."""
        if self._entry is not None:
            self._entry = replace(self._entry, observed_at=time.time())
            if self.late is None:
                self._publish(self._entry)

    def forget_mapping(self) -> None:
        """Leave mapping and mount out of the next entry that is published."""
        if self._entry is not None:
            self._entry = replace(
                self._entry, mapping_name="", mapping_node="", mount_point="", filesystem="",
                read_only=False,
            )  # fmt: skip

    def publish_late(self, why: str | None) -> None:
        """Publish that an operation takes long, and why; with None, that it has ended after all.

        Once the medium has departed, nothing more is published.
        """
        if self.state in {State.GONE, State.REMOVED_UNSAFELY}:
            return
        self.late = why
        if why is not None:
            now = self._entry or Entry(self.volume, State.STUCK)
            self._publish(replace(now, state=State.STUCK, reason=why))
        else:  # a volume without a status before has none again
            self._publish(self._entry or Entry(self.volume, State.GONE))
