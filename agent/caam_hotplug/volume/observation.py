"""Comparison of what an active volume holds with what the kernel has, and what follows from it."""

from __future__ import annotations

import asyncio
import logging
from functools import partial
from typing import Any

from caam_hotplug.errors import HotplugError, UnknownError, shown
from caam_hotplug.kernel.unknown import FIRST_DELAY_S
from caam_hotplug.model import Mapping, Mount, State
from caam_hotplug.volume.holding import UNMAPPED, UNMOUNTED, Interference
from caam_hotplug.volume.mount_table import first_of, mounts_at
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.release import suspended
from caam_hotplug.volume.stop_signal import Reason
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.writes import Writes

log = logging.getLogger(__name__)


def words_of(mount: Mount) -> str:
    """Return where and how it is mounted, in words."""
    access = "read-only" if mount.read_only else "read-write"
    journal = ", without what its journal has" if mount.leaves_journal else ""
    return f"at {mount.point}, {access}{journal}"


class Observation:
    """What one active volume holds, compared on its own coroutine. Synchronization: loop only."""

    def __init__(
        self, record: Record, operations: Operations, target: Target, writes: Writes
    ) -> None:
        self._record = record
        self._writes = writes
        self._holding = record.holding
        self._operations = operations
        self._kernel = operations.kernel
        self._target = target

    async def compare(self) -> Interference | None:
        """Publish what is different, and return what the volume is to be released for, if anything.

        Another table in the mapping ends the lifecycle. What is not known changes nothing, and is
        compared again.
        """
        try:
            if self._holding.is_mapping_doubted and await self.mapping() is None:
                return UNMAPPED
            return None if self._operations.stop.is_set else await self._compare_mount()
        except (HotplugError, OSError) as error:
            self._holding.found = self._holding.mount
            self._compare_later(error)
            return None

    async def mapping(self) -> Mapping | None:
        """Return the mapping as the kernel has it, None if it has gone. Raises: DmError.

        With another table than the volume's, all I/O is stopped first, and the lifecycle ends:
        what is not written yet must not reach what that table leads to.
        """
        held, stop = self._holding.mapping, self._operations.stop
        self._holding.is_mapping_doubted = False
        live = await self._operations.dm(
            "look for the mapping", self._kernel.find_mapping, self._target.dm_uuid
        )
        if live is None or held is None or stop.medium_gone:
            return live
        if (live.number, live.table) != (held.number, held.table):
            has = "; ".join(live.table) or "no table"
            log.error("%s: mapping %s has been changed: %s", self._record.volume, live.name, has)
            stop.set(Reason.OTHER_TABLE)
            await self._operations.cut_off.done()
        elif live.name != held.name:
            self._record.status.publish_facts(mapping_name=live.name)
        self._holding.mapping = live
        return live

    async def require_running(self) -> None:
        """Raise RequestRefusedError for a suspended mapping: a write to it would wait without end.

        Raises: DmError.
        """
        live = await self.mapping()
        if live is not None and live.is_suspended and not self._operations.stop.medium_gone:
            raise suspended(live)

    async def prepare_flush(self) -> None:
        """Have the mapping ready for the flush of a release that waits for nobody.

        One that others have suspended is resumed, with the table that it has.
        """
        if self._operations.stop.medium_gone:
            return
        try:
            live = await self.mapping()
            if live is not None and live.is_suspended and not self._operations.stop.medium_gone:
                log.warning(
                    "%s: mapping %s is suspended; resuming it", self._record.volume, live.name
                )
                resume = partial(self._kernel.resume_mapping, live.name)
                await self._operations.dm("resume the mapping", resume)
        except (HotplugError, OSError) as error:
            log.warning("%s: %s", self._record.volume, error)

    def compare_again(self) -> None:
        """Compare after an own change that was not made: mounts may have changed meanwhile."""
        self._holding.is_paused = False
        try:
            self._holding.compare(self._kernel.mounts())
        except UnknownError as error:
            self._compare_later(error)

    def _compare_later(self, error: Exception) -> None:
        log.warning("%s: compare it: %s; it is compared again", self._record.volume, error)

        def compare() -> None:
            self._holding.doubt_mapping()
            self.compare_again()

        asyncio.get_running_loop().call_later(FIRST_DELAY_S, compare)

    async def _compare_mount(self) -> Interference | None:
        holding, now = self._holding, self._holding.found
        if holding.mapping is None or holding.mount is None or not holding.differs:
            return None
        if now is None:
            # Somebody may have mounted it anew, as after a check.
            name = self._target.plan.mount_name
            now = first_of(holding.mapping, mounts_at(self._kernel, name))
            if now is None:
                return UNMOUNTED
        was_writable = holding.was_writable
        holding.publish(now)
        try:
            if was_writable and not holding.is_writable:
                await self._look_for_errors()
        finally:
            self.publish_mounted(now)
        return None

    def publish_mounted(self, mount: Mount, **facts: Any) -> None:
        """Publish where and how it is mounted, and what could not be written to it."""
        words, lost, cover = words_of(mount), self._record.lost, self._holding.cover
        if cover is not None:
            words += f", hidden by {shown(cover.source)}, which is mounted at {shown(cover.point)}"
        self._record.status.publish(
            State.MOUNTED, f"{words}; {lost}" if lost else words, mount_point=mount.point,
            filesystem=mount.filesystem, read_only=mount.read_only, **facts,
        )  # fmt: skip

    async def _look_for_errors(self) -> None:
        """Look why a filesystem has become read-only: by a user, who has flushed it, or an error.

        Raises: HotplugError, OSError if that is not known.
        """
        if self._writes.watch is not None:
            await self._operations.call("flush", self._writes.watch.check)
            self._writes.note()
            self._record.note_lost(self._writes.error)
