"""Comparison of what an active volume holds with what the kernel has, and what follows from it."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, Final

from caam_hotplug.errors import HotplugError, UnknownError, shown
from caam_hotplug.kernel.unknown import FIRST_DELAY_S
from caam_hotplug.model import Mapping, Mount, State
from caam_hotplug.volume.holding import UNMAPPED, UNMOUNTED, Interference
from caam_hotplug.volume.mapping import backend_that_made, cut_off_changed
from caam_hotplug.volume.mount_table import first_of, mounts_at
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.release import suspended
from caam_hotplug.volume.stop_signal import Reason
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.writes import Writes

log = logging.getLogger(__name__)

_BY_ERROR: Final = (
    "its filesystem has become read-only by an error; what was written last may be lost"
)
_OFFLINE: Final = (
    "the kernel has taken its disk offline, so all reads and writes fail; `lock` releases it"
)
_REMOUNTED_WITHIN_S: Final = 0.5
"""How long a remount may take from the filesystem to the mount."""


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
        self._said: tuple[str, ...] = ()
        """What was published beside the mounts."""
        self._failure = ""
        """Why the last comparison failed; empty if it did not."""

    async def compare(self) -> Interference | None:
        """Publish what is different, and return what the volume is to be released for, if anything.

        Another table in the mapping ends the lifecycle. What is not known changes nothing, and is
        compared again.
        """
        holding = self._holding
        is_full, holding.is_look_wanted = holding.is_look_wanted, False
        try:
            if is_full:
                return await self.look()
            if holding.is_mapping_doubted and await self.mapping() is None:
                return UNMAPPED
            return None if self._operations.stop.is_set else await self._compare_mounts()
        except (HotplugError, OSError) as error:
            holding.found, holding.found_others = holding.mount, holding.others
            self._compare_later(error)
            return None

    async def look(self) -> Interference | None:
        """As `compare`, also of what no event reports. Raises: HotplugError, OSError."""
        holding, stop = self._holding, self._operations.stop
        if await self.mapping() is None:
            return UNMAPPED
        if stop.medium_gone:
            return None
        holding.compare(self._kernel.mounts())
        await self._look_below()
        found = await self._compare_mounts()
        self._failure = ""
        if found is None:
            self._record.status.note_look()
        return found

    async def _look_below(self) -> None:
        """Look at errors that the filesystem has counted, and at the disk."""
        watch = self._writes.watch if self._holding.mount is not None else None
        volume, kernel = self._target.volume, self._kernel

        def look() -> bool:
            if watch is not None:
                watch.look()
            return kernel.is_offline(volume)

        self._holding.is_offline = await self._operations.call("look at it", look)
        self._writes.note()
        self._record.note_lost(self._writes.error)

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
            await cut_off_changed(self._operations, self._record.volume, live)
        elif live.name != held.name:
            self._record.status.publish_facts(mapping_name=live.name)
        self._holding.mapping = live
        return live

    async def require_running(self) -> None:
        """Look before a release. A disk that is offline is cut off: nothing waits for its I/O.

        Raises: RequestRefusedError for a suspended mapping, to which a write would wait without
        end; HotplugError, OSError.
        """
        await self._look_before_release()
        live = self._holding.mapping
        if live is not None and live.is_suspended and not self._operations.stop.medium_gone:
            raise suspended(live)

    async def _look_before_release(self) -> None:
        stop, self._holding.is_paused = self._operations.stop, True
        if stop.medium_gone:
            return
        try:
            await self.look()
        except UnknownError as error:  # what cannot be seen is in the way of nothing
            log.warning("%s: %s", self._record.volume, error)
        if self._holding.is_offline and not stop.medium_gone:
            log.warning("%s: %s", self._record.volume, Reason.OFFLINE.value)
            stop.set(Reason.OFFLINE)
            await self._operations.cut_off.done()

    async def prepare_flush(self) -> None:
        """Have the mapping ready for the flush of a release that waits for nobody.

        One that others have suspended is resumed, with the table that it has.
        """
        try:
            await self._look_before_release()
            live = self._holding.mapping
            if live is not None and live.is_suspended and not self._operations.stop.medium_gone:
                log.warning(
                    "%s: mapping %s is suspended; resuming it", self._record.volume, live.name
                )
                resume = partial(self._kernel.resume_mapping, live.name)
                await self._operations.dm("resume the mapping", resume)
                self._holding.mapping = replace(live, is_suspended=False)
        except (HotplugError, OSError) as error:
            log.warning("%s: %s", self._record.volume, error)

    def go_on(self) -> None:
        """Publish and compare again after a release that was not made."""
        self._holding.is_paused = False
        self.publish()
        self._compare_again()

    def _compare_again(self) -> None:
        try:
            self._holding.compare(self._kernel.mounts())
        except UnknownError as error:
            self._compare_later(error)

    def _compare_later(self, error: Exception) -> None:
        if str(error) != self._failure:
            log.warning("%s: compare it: %s; it is compared again", self._record.volume, error)
        self._failure = str(error)

        def compare() -> None:
            self._holding.doubt_mapping()
            self._compare_again()

        asyncio.get_running_loop().call_later(FIRST_DELAY_S, compare)

    async def _compare_mounts(self) -> Interference | None:
        holding, now = self._holding, self._holding.found
        is_same = not holding.differs and self._said == self._to_say()
        if holding.mapping is None or is_same:
            return None
        if holding.mount is None:
            holding.publish_others()
            self.publish()
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
                await self._look_for_errors(now)
        finally:
            self.publish()
        return None

    def begin_for_others(self, **facts: Any) -> None:
        """Publish a mapping that is not mounted here, and notice from now on where others do."""
        holding = self._holding
        holding.is_for_others = True
        if holding.mapping is not None and holding.mapping.open_count:
            with suppress(UnknownError):  # the next look sees it
                holding.compare(self._kernel.mounts())
                holding.publish_others()
        self.publish(**facts)

    # What is published.

    def publish(self, **facts: Any) -> None:
        """Publish what is held, and what could not be written; nothing during a release."""
        holding = self._holding
        if holding.is_paused or holding.mapping is None:
            return
        self._said = self._to_say()
        if holding.mount is not None:
            self._publish_mounted(holding.mount, facts)
        else:
            self._publish_unlocked(holding.mapping, facts)

    def _to_say(self) -> tuple[str, ...]:
        """Return what is to be published beside the mounts."""
        live = self._holding.mapping
        is_suspended = live is not None and live.is_suspended
        said = [self._record.lost, str(suspended(live)) if live and is_suspended else ""]
        return (*filter(None, said), *([_OFFLINE] if self._holding.is_offline else []))

    def _publish_mounted(self, mount: Mount, facts: dict[str, Any]) -> None:
        cover = self._holding.cover
        is_read_only = mount.read_only or (mount.stops_at_errors and self._writes.has_errors)
        words = f"at {mount.point}, {'read-only' if is_read_only else 'read-write'}"
        words += ", without what its journal has" if mount.leaves_journal else ""
        if cover is not None:
            words += f", hidden by {shown(cover.source)}, which is mounted at {shown(cover.point)}"
        self._record.status.publish(
            State.MOUNTED, "; ".join((words, *self._said)), mount_point=mount.point,
            filesystem=mount.filesystem, read_only=is_read_only, **facts,
        )  # fmt: skip

    def _publish_unlocked(self, mapping: Mapping, facts: dict[str, Any]) -> None:
        """Publish the mapping, and where others have mounted it."""
        words = [f"as {mapping.name}, by its {backend_that_made(mapping)} key"]
        others = self._holding.others
        words += [] if self._record.mounts else ["not mounted, since that was asked for"]
        words += [f"mounted at {shown(mount.point)} by somebody else" for mount in others]
        first = next(iter(others), None)
        where = {"mount_point": "", "filesystem": "", "read_only": False}
        if first is not None:
            where = {
                "mount_point": first.point, "filesystem": first.filesystem,
                "read_only": first.read_only,
            }  # fmt: skip
        said = "; ".join((*words, *self._said))
        self._record.status.publish(State.UNLOCKED, said, **where, **facts)

    async def _look_for_errors(self, now: Mount) -> None:
        """Look why a filesystem has become read-only: by a user, who has flushed it, or an error.

        Raises: HotplugError, OSError if that is not known.
        """
        if self._writes.watch is None:
            return
        if await self._is_by_error(now):
            self._writes.lose(_BY_ERROR)
        else:
            await self._operations.call("flush", self._writes.watch.check)
            self._writes.note()
        self._record.note_lost(self._writes.error)

    async def _is_by_error(self, now: Mount) -> bool:
        """Whether no mount of it is read-only, as a remount makes one, also not a moment later."""
        if now.is_point_read_only:
            return False
        await asyncio.sleep(_REMOUNTED_WITHIN_S)
        mounts = [m for m in self._kernel.mounts() if m.number == now.number]
        still = any(m.is_filesystem_read_only for m in mounts)
        return still and not any(m.is_point_read_only for m in mounts)
