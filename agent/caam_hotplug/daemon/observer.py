"""Compares what volumes hold with what the kernel has, when the kernel says that it has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.kernel.unknown import FIRST_DELAY_S
from caam_hotplug.systemd import journal
from caam_hotplug.volume.record import Record

log = logging.getLogger(__name__)


class Observer:
    """The one place where events of what is held arrive. Synchronization: loop only.

    Only the lifecycle of a volume whose mount or mapping may differ is woken, and acts. Nothing
    runs while nothing happens.
    """

    def __init__(self, kernel: Kernel, records: Callable[[], Sequence[Record]]) -> None:
        """`records`: those of all volumes that are present."""
        self._kernel = kernel
        self._records = records
        self._again: asyncio.TimerHandle | None = None

    def mounts_changed(self) -> None:
        """Read the mounts once, and compare what volumes have mounted. Not known is no change."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        concerned = [record.holding for record in self._records() if _watches_mounts(record)]
        if not concerned:
            return
        try:
            mounts = self._kernel.mounts()
        except UnknownError as error:
            log.warning("%s; looking again", error)
            loop = asyncio.get_running_loop()
            self._again = loop.call_later(FIRST_DELAY_S, self.mounts_changed)
            return
        for holding in concerned:
            holding.compare(mounts)

    def mapping_changed(self, name: str) -> None:
        """Have a mapping looked at that the kernel has changed or removed."""
        for record in self._records():
            record.holding.mapping_changed(f"/dev/{name}")

    def events_lost(self) -> None:
        """Say so, and have all mappings looked at: any of them may have changed."""
        lost = journal.event(journal.Event.EVENTS_LOST)
        log.warning("the kernel dropped events; looking at all devices", extra=lost)
        for record in self._records():
            record.holding.doubt_mapping()


def _watches_mounts(record: Record) -> bool:
    return record.holding.watches_mounts and not record.stop.is_set
