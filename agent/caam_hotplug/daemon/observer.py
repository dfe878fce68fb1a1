"""Compares what volumes hold with what the kernel has, when the kernel says that it has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from caam_hotplug import names
from caam_hotplug.daemon.retries import Retries
from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import VolumeId
from caam_hotplug.systemd import journal
from caam_hotplug.volume.obstacles import Obstacle
from caam_hotplug.volume.record import Record

log = logging.getLogger(__name__)

LOOKS_AFTER_S: Final = 1.0


class Observer:
    """The one place where events of what is held arrive. Synchronization: loop only.

    Only the lifecycle of a volume whose mount or mapping may differ is woken, and acts. Nothing
    runs while nothing happens.
    """

    def __init__(self, kernel: Kernel, records: Callable[[], Sequence[Record]]) -> None:
        """`records`: those of all volumes that are present."""
        self._kernel = kernel
        self._records = records
        self._retries = Retries(self._compare_mounts)

    def mounts_changed(self) -> None:
        """Read the mounts once, and compare what volumes have mounted.

        Volumes that are not served look themselves whether what was in their way has gone.
        """
        for record in self._records():
            record.inbox.note_mounts(concerns=bool(record.obstacle))
        self._compare_mounts()

    def _compare_mounts(self) -> None:
        """Compare what volumes have mounted. Not known is no change: it is said once."""
        concerned = [record.holding for record in self._records() if _watches_mounts(record)]
        if not concerned:
            self._retries.succeeded()
            return
        try:
            mounts = self._kernel.mounts()
        except UnknownError as error:
            if self._retries.failed():
                log.warning("%s; they count as they were, and are looked at again", error)
            return
        if self._retries.succeeded():
            log.info("look at the mounts: the kernel answers again")
        for holding in concerned:
            holding.compare(mounts)

    def look(self, which: VolumeId) -> None:
        """Have a volume looked at, also at what no event reports: at most once a second."""
        record = next((each for each in self._records() if each.volume.id == which), None)
        now = asyncio.get_running_loop().time()
        if record is None or now - record.holding.looked_at < LOOKS_AFTER_S:
            return
        record.holding.looked_at = now
        if record.holding.mapping is None or Obstacle.MAPPING in record.obstacle:
            record.status.note_look()  # nothing is held that could be another
        else:
            record.holding.want_look()

    def disk_changed(self, disk: str) -> None:
        """Have the volumes of a disk looked at: another medium is in it, or it is offline."""
        for record in self._records():
            if record.volume.name == disk or names.is_partition_of(record.volume.name, disk):
                record.holding.want_look()

    def mapping_changed(self, name: str) -> None:
        """Have a mapping looked at that the kernel has changed or removed."""
        for record in self._records():
            if record.holding.mapping_changed(f"/dev/{name}"):
                record.cut_off.mapping_changed()

    def events_lost(self) -> None:
        """Say so, and have all mappings looked at: any of them may have changed."""
        lost = journal.event(journal.Event.EVENTS_LOST)
        log.warning("the kernel dropped events; looking at all devices", extra=lost)
        for record in self._records():
            record.holding.doubt_mapping()


def _watches_mounts(record: Record) -> bool:
    return record.holding.watches_mounts and not record.stop.is_set
