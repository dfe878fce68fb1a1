"""Compares what volumes hold with what the kernel has, when the kernel says that it has changed."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.kernel.unknown import FIRST_DELAY_S
from caam_hotplug.model import VolumeId
from caam_hotplug.systemd import journal
from caam_hotplug.volume.record import Record

log = logging.getLogger(__name__)

LOOKS_AFTER_S: Final = 1.0
_COUNTED_SOON_S: Final = 0.1
_COUNTED_LATE_S: Final = 120.0
"""With all delays before it, longer than six attempts of 30 s, after which a SCSI disk gives up."""


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
        self._after_error: asyncio.TimerHandle | None = None
        """The next look after an error of a filesystem."""

    def mounts_changed(self) -> None:
        """Read the mounts once, and compare what volumes have mounted. Not known is no change.

        Volumes that are not served look themselves whether what was in their way has gone.
        """
        if self._again is not None:
            self._again.cancel()
            self._again = None
        for record in self._records():
            record.inbox.note_mounts(concerns=bool(record.obstacle))
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

    def look(self, which: VolumeId) -> None:
        """Have a volume looked at, also at what no event reports: at most once a second."""
        record = next((each for each in self._records() if each.volume.id == which), None)
        now = asyncio.get_running_loop().time()
        if record is None or now - record.holding.looked_at < LOOKS_AFTER_S:
            return
        record.holding.looked_at = now
        if record.holding.mapping is None:
            record.status.note_look()  # nothing is held that could be another
        else:
            record.holding.want_look()

    def disk_changed(self, disk: str) -> None:
        """Have the volumes of a disk looked at: another medium is in it, or it is offline."""
        for record in self._records():
            if record.volume.name == disk or names.is_partition_of(record.volume.name, disk):
                record.holding.want_look()

    def filesystem_failed(self) -> None:
        """Have all mounted volumes looked at: the filesystem of one of them has met an error.

        ext4 reports an error, then writes to the medium, and then counts the error: how long that
        takes depends on the medium. So they are looked at again, less and less often.
        Source: __ext4_error and ext4_handle_error in fs/ext4/super.c.
        """
        if self._after_error is not None:
            self._after_error.cancel()
        self._look_at_mounted(_COUNTED_SOON_S)

    def _look_at_mounted(self, again_after_s: float) -> None:
        self._after_error = None
        mounted = [each.holding for each in self._records() if each.holding.mount is not None]
        for holding in mounted:
            holding.want_look()
        if mounted and again_after_s < _COUNTED_LATE_S:
            loop, look = asyncio.get_running_loop(), self._look_at_mounted
            self._after_error = loop.call_later(again_after_s, look, 2 * again_after_s)

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
