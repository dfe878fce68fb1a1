"""The volumes of a disk, as what ejects the disk sees them."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Set
from typing import Any, Protocol

from caam_hotplug.model import State, Volume, VolumeId
from caam_hotplug.volume.record import Record


class DiskVolumes(Protocol):
    """The volumes that are present, as far as the eject of a disk needs them."""

    def records_of(self, diskseq: int) -> list[Record]:
        """Return the records of the disk's volumes."""
        ...

    def run(self, work: Coroutine[Any, Any, None], name: Callable[[], str]) -> None:
        """Run the work to its end, also for a client that has gone."""
        ...

    def depart(self, diskseq: int, but: Set[VolumeId]) -> None:
        """End the lifecycles of the disk's volumes but for these."""
        ...

    def start_parked(self, volume: Volume, state: State, reason: str) -> None:
        """Start the lifecycle of a volume that was released on request, unless it has one."""
        ...
