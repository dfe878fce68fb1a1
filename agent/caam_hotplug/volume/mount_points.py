"""Which volume a mount point belongs to while several want it: the first that came."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from caam_hotplug.model import VolumeId


class MountPoints:
    """A queue for every name; who is at its head owns it. Synchronization: loop only."""

    def __init__(self) -> None:
        self._queues: dict[str, dict[VolumeId, Callable[[], None]]] = {}

    def owner(self, name: str) -> VolumeId | None:
        """The volume that owns the name, or None."""
        return next(iter(self._queues.get(name, ())), None)

    @contextmanager
    def queued(self, name: str, volume: VolumeId, stir: Callable[[], None]) -> Iterator[None]:
        """The volume stands in the name's queue; `stir` is called when it may be the owner."""
        queue = self._queues.setdefault(name, {})
        queue[volume] = stir
        try:
            yield
        finally:
            del queue[volume]
            for waiting in queue.values():
                waiting()
            if not queue:
                del self._queues[name]
