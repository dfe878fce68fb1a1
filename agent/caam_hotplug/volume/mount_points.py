"""Reservation of mount points: of several volumes that want one, the first has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from caam_hotplug import names
from caam_hotplug.model import VolumeId


class MountPoints:
    """A queue of volumes; the first that wants a mount point has it.

    One below another's is not free either: it would lie in that volume's filesystem. No
    configuration has two such, but the one before may have had the other.
    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self._queue: dict[tuple[str, VolumeId], Callable[[], None]] = {}

    def owner(self, place: str) -> VolumeId | None:
        """Return the volume that has the mount point reserved, or one above or below it."""
        wanted = (v for reserved, v in self._queue if names.are_nested(reserved, place))
        return next(wanted, None)

    @contextmanager
    def reserved(self, place: str, volume: VolumeId, wake: Callable[[], None]) -> Iterator[None]:
        """Keep the volume in the queue for a mount point; `wake` is called when it moves up."""
        self._queue[place, volume] = wake
        try:
            yield
        finally:
            del self._queue[place, volume]
            for (other, _), wake_waiting in list(self._queue.items()):
                if names.are_nested(other, place):
                    wake_waiting()
