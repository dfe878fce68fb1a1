"""Reservation of mount points: of several volumes that want one, the first has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from caam_hotplug.model import VolumeId


class MountPoints:
    """A queue for each name in the mount root; its head has the mount point.

    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self._queues: dict[str, dict[VolumeId, Callable[[], None]]] = {}

    def owner(self, name: str) -> VolumeId | None:
        """Return the volume that has the mount point reserved, or None."""
        return next(iter(self._queues.get(name, ())), None)

    @contextmanager
    def reserved(self, name: str, volume: VolumeId, wake: Callable[[], None]) -> Iterator[None]:
        """Keep the volume in the queue for a mount point; `wake` is called when it moves up."""
        queue = self._queues.setdefault(name, {})
        queue[volume] = wake
        try:
            yield
        finally:
            del queue[volume]
            for wake_waiting in queue.values():
                wake_waiting()
            if not queue:
                del self._queues[name]
