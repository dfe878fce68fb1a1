"""Disks whose medium was changed: once all of the old medium is released, the new one is read."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from caam_hotplug import names
from caam_hotplug.errors import HotplugError, UnknownError
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.model import DeviceNumber, Mapping, VolumeId
from caam_hotplug.volume.record import Context

log = logging.getLogger(__name__)

Run = Callable[[Coroutine[Any, Any, None], Callable[[], str]], None]
"""Run the work beside others, under the name."""


class ChangedDisks:
    """Counts what is left of each medium. Synchronization: loop only.

    The kernel reads a reader's new table only when no partition of the old one is in use and
    somebody opens the disk; udev has done that too early.
    """

    def __init__(self, context: Context, run: Run) -> None:
        self._context = context
        self._run = run
        self._left: Counter[int] = Counter()
        """How many volumes of a medium are not released, by its disk sequence number."""
        self._used: dict[int, tuple[VolumeId, DeviceNumber]] = {}
        """A volume of each medium that was not released when the medium went."""

    def begin(self, which: VolumeId) -> None:
        """Note a volume that may hold its medium."""
        self._left[which.diskseq] += 1

    def end(self, which: VolumeId, used: DeviceNumber | None) -> None:
        """Note that it is released. `used`: its device, if the medium went before that.

        Also the open device, before there is a mapping, keeps the partition in use.
        """
        if used is not None:
            self._used.setdefault(which.diskseq, (which, used))
        self._left[which.diskseq] -= 1
        if self._left[which.diskseq]:
            return
        del self._left[which.diskseq]
        if which.diskseq not in self._used:
            return
        try:
            disk = self._context.kernel.changed_disk(*self._used.pop(which.diskseq))
        except UnknownError as error:
            log.warning("%s; if another medium is in it, plug it again", error)
            return
        if disk is not None:
            self._run(self._read_table(disk), partial(str, f"{disk}: read the new table"))

    @contextmanager
    def without_volume(self, orphan: Mapping) -> Iterator[None]:
        """Note a mapping of an earlier run until it is released."""
        which = names.volume_of_dm_uuid(orphan.uuid)
        crypt = CryptTarget.from_line(orphan.table[0]) if orphan.table else None
        if which is None:
            yield
            return
        self.begin(which)
        try:
            yield
        finally:
            self.end(which, None if crypt is None else crypt.device)

    async def _read_table(self, disk: str) -> None:
        context = self._context
        words = "read the new table"
        try:
            worker = context.new_worker(f"disk {disk}")
            await worker.run(words, context.kernel.read_table, disk, late=partial(_log_late, disk))
        except (HotplugError, OSError) as error:
            log.error("%s: %s: %s", disk, words, error)


def _log_late(disk: str, why: str | None) -> None:
    if why is not None:
        log.warning("%s: read the new table: %s", disk, why)
