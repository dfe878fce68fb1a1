"""What is published of one volume, and what of it is still true when something takes long."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from caam_hotplug.model import Entry, State, Volume

Publish = Callable[[Entry], None]


class VolumeStatus:
    """How a volume stands. Synchronization: loop only."""

    def __init__(self, volume: Volume, publish: Publish) -> None:
        self.volume = volume
        """As it is now; what is published next says so."""
        self.is_stuck = False
        """Whether a step takes longer than it should."""
        self._publish = publish
        self._entry: Entry | None = None

    @property
    def state(self) -> State | None:
        """The state that it came to last, whether or not a step takes long."""
        return None if self._entry is None else self._entry.state

    @property
    def words(self) -> str:
        """State and reason."""
        return "" if self._entry is None else f"{self._entry.state.value}: {self._entry.reason}"

    @property
    def reason(self) -> str:
        """The reason of its state."""
        return "" if self._entry is None else self._entry.reason

    @property
    def blob(self) -> str:
        """The path of the blob that it needs; empty if no rule matches it."""
        return "" if self._entry is None else self._entry.blob

    def becomes(self, state: State, reason: str = "", **facts: Any) -> None:
        """This is true of it, and everyone knows; facts that are not named stay."""
        now = self._entry or Entry(self.volume, state)
        self._entry = replace(now, volume=self.volume, state=state, reason=reason, **facts)
        self._publish(self._entry)

    def has(self, **facts: Any) -> None:
        """These facts are others than before."""
        if self._entry is not None:
            self.becomes(self._entry.state, self._entry.reason, **facts)

    def holds_nothing(self) -> None:
        """What is published next says that nothing is mapped or mounted."""
        if self._entry is not None:
            self._entry = replace(
                self._entry, mapping_name="", mapping_node="", mount_point="", filesystem="",
                read_only=False,
            )  # fmt: skip

    def is_late(self, why: str | None) -> None:
        """A step takes long, for this reason; None: it has ended after all.

        Of a volume that has left nothing more is said.
        """
        if self.state in {State.GONE, State.REMOVED_UNSAFELY}:
            return
        self.is_stuck = why is not None
        if why is not None:
            now = self._entry or Entry(self.volume, State.STUCK)
            self._publish(replace(now, state=State.STUCK, reason=why))
        else:  # of a volume of which nothing was said yet nothing is said again
            self._publish(self._entry or Entry(self.volume, State.GONE))
