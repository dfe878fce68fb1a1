"""Decides that a medium is safe to remove: nothing of its disk is in use, and all is written.

The volumes of the disk are released first. Then the disk is held exclusively, and its partitions
are removed from the kernel; the kernel refuses that while anything of it is in use. The disk stays
held until it is unlocked or pulled, so nobody can begin to use it after the check.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Set
from contextlib import suppress
from typing import Any, Final

from caam_hotplug.daemon.disk_hold import DiskHold
from caam_hotplug.daemon.disk_volumes import DiskVolumes
from caam_hotplug.errors import HotplugError, RequestRefusedError, VolumeBusyError, WritesLostError
from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import Bus, State, Volume, VolumeId
from caam_hotplug.volume.phases import CHANGED, REREAD
from caam_hotplug.volume.record import Context, Record
from caam_hotplug.volume.requests import Ask, Request

SAFE: Final = "safe to remove"
_RELEASED: Final = {State.IGNORED, State.LOCKED, State.EJECTED}
"""States of a volume that holds nothing, unless a leftover is there."""


class SafeRemoval:
    """The disks that are being ejected, or are ejected. Synchronization: loop only."""

    def __init__(self, context: Context, volumes: DiskVolumes) -> None:
        self._context = context
        self._volumes = volumes
        self._holds: dict[int, DiskHold] = {}
        self._is_closed = False

    # Events.

    def keeps(self, which: VolumeId) -> bool:
        """Return whether the volume is there though the kernel has removed its partition."""
        return which.partition != 0 and which.diskseq in self._holds

    def appeared(self, which: VolumeId) -> None:
        """Note a report of a partition, or one more of a disk, that nobody holds any more.

        Others have read the disk's partitions, or may have written to the disk.
        """
        hold = self._holds.get(which.diskseq)
        if hold is None or hold.step or hold.is_held:
            return
        if which.partition == 0:
            if any(r.volume.id == which for r in self._volumes.records_of(which.diskseq)):
                self._revoke(which.diskseq, CHANGED)
            return
        del self._holds[which.diskseq]
        self._revoke(which.diskseq, REREAD)
        self._end_absent(which.diskseq, but={which})

    def departed(self, diskseq: int) -> None:
        """Note that the disk has gone."""
        hold = self._holds.pop(diskseq, None)
        if hold is not None and not hold.step:  # else the request does that at its end
            self._volumes.run(hold.give_back(), lambda: f"disk {diskseq}: give it back")

    def close(self) -> None:
        """Hold no disk any more."""
        self._is_closed = True
        for diskseq in list(self._holds):
            self.departed(diskseq)

    # Requests.

    async def eject(self, record: Record, by: str, *, power_off: bool) -> None:
        """Release all volumes of the disk, hold it, and publish them as safe to remove.

        Raises: RequestRefusedError if anything of the disk is in use, or if written data were lost.
        Volumes that were released before stay released, and none is safe to remove.
        """
        try:
            await self._eject(record, by, power_off=power_off)
        except RequestRefusedError as error:
            record.inbox.log_refusal(Request(Ask.EJECT, by), error)
            raise

    async def _eject(self, record: Record, by: str, *, power_off: bool) -> None:
        volume = record.volume
        if record.why_not(Ask.EJECT) is not None:
            await record.ask(Request(Ask.EJECT, by))  # it says why
        hold = self._begin(volume, "eject")
        try:
            if not hold.is_held:
                await self._require_removable(record, hold)
                await self._release_all(record, by)
        except BaseException as error:
            self._revoke(volume.id.diskseq, f"it is not safe to remove any more: {error}")
            await self._end(volume, hold)
            raise
        await self._to_the_end(volume, hold, self._finish(record, hold, power_off=power_off))

    async def before_unlock(self, record: Record, by: str) -> None:
        """Have the kernel read the partitions of an ejected disk again.

        Raises: RequestRefusedError if that cannot be, or while the disk is being ejected.
        """
        volume = record.volume
        is_away = record.parked is not None and not self._context.kernel.is_present(volume)
        if is_away or volume.id.diskseq in self._holds:
            try:
                hold = self._begin(volume, "unlock")
                await self._to_the_end(volume, hold, self._restore(record, hold))
            except HotplugError as error:
                record.inbox.log_refusal(Request(Ask.UNLOCK, by), error)
                raise

    async def recover(self, disk: Volume) -> None:
        """Take on a disk that an earlier run has emptied; one with partitions was read anew since.

        An ejected one is held again, and its volumes are published. If the eject was cut short, the
        kernel reads the partitions again. Partitions that it has are locked when they are found.
        """
        kernel, diskseq = self._context.kernel, disk.id.diskseq
        found = map(Mark.from_text, kernel.remembered_on(disk))
        parked = [mark for mark in found if mark is not None and mark.state is not None]
        ejected = [mark for mark in parked if mark.state is State.EJECTED]
        marks = ejected or [mark for mark in parked if mark.volume.id.partition]
        if not marks or diskseq in self._holds:
            return
        hold = self._begin(disk, "eject" if ejected else "unlock")
        state, reason, failure = State.EJECTED, SAFE, None
        try:
            if kernel.has_partitions(disk):
                self._forget_absent(ejected)
                marks = []
            elif not ejected:
                await hold.restore(disk, _ignore_late)
                marks = []
            else:
                await hold.hold(disk, _ignore_late)
                if not any(mark.is_held for mark in marks):
                    await hold.give_back()
        except (HotplugError, OSError) as error:
            words = f"it was {SAFE} before, but now" if ejected else "its eject was cut short"
            state, reason, failure = State.LOCKED, f"{words}: {error}", error
        is_held = hold.is_held
        await self._end(disk, hold)
        if marks and (state is State.LOCKED or diskseq in self._holds):
            for mark in marks:
                self._volumes.start_parked(mark.volume, state, reason)
            self._note_lost(diskseq, failure)
            for record in self._volumes.records_of(diskseq):
                record.repark(state, reason, is_held=is_held)

    def _forget_absent(self, marks: list[Mark]) -> None:
        for mark in marks:
            if mark.volume.id.partition and not self._context.kernel.is_present(mark.volume):
                self._context.kernel.remember(mark.volume, "")

    # Steps.

    def _begin(self, volume: Volume, what: str) -> DiskHold:
        hold = self._holds.get(volume.id.diskseq) or DiskHold(self._context)
        if hold.step:
            raise RequestRefusedError(f"{what} {volume}: the medium is being ejected or unlocked")
        self._holds[volume.id.diskseq] = hold
        hold.step = what
        return hold

    async def _end(self, volume: Volume, hold: DiskHold) -> None:
        hold.step = ""
        if self._holds.get(volume.id.diskseq) is not hold:  # it has departed meanwhile
            await hold.give_back()
        elif not hold.is_emptied:
            del self._holds[volume.id.diskseq]

    async def _require_removable(self, record: Record, hold: DiskHold) -> None:
        """Raise RequestRefusedError, before anything is released, if it cannot become safe."""
        volume = record.volume
        if volume.bus is Bus.MMC and not volume.removable:
            raise RequestRefusedError(
                f"eject {volume}: it is built in, and cannot be removed; `lock` releases it"
            )
        records = self._volumes.records_of(volume.id.diskseq)
        if not any(each.holding.is_offline for each in records):  # else all are released
            self._require_written(record)
        users = await hold.look_who_uses(volume, record.status.publish_late)
        if users:
            what = f"eject {volume}: `lock` releases this volume alone, for its disk"
            raise VolumeBusyError(what, tuple(users))

    async def _release_all(self, record: Record, by: str) -> None:
        for sibling in self._volumes.records_of(record.volume.id.diskseq):
            is_released = sibling.status.state in _RELEASED and not sibling.phase.has_leftover
            is_asked = sibling.inbox.request is not None
            if sibling is not record and (is_asked or not is_released):
                await self._release(sibling, by)
        await self._release(record, by)
        self._require_written(record)  # only now: one that has lost data may be released, too

    async def _release(self, record: Record, by: str) -> None:
        try:
            await record.ask(Request(Ask.EJECT, by))
        except WritesLostError:
            self._require_written(record)  # with more words
            raise

    def _require_written(self, record: Record) -> None:
        """Raise WritesLostError if not all was written to the disk's volumes."""
        for each in self._volumes.records_of(record.volume.id.diskseq):
            if each.lost:
                lock = "" if each.parked is not None else "; `lock` releases it nevertheless"
                raise WritesLostError(
                    f"eject {record.volume}: it is not safe to remove: {each.lost} "
                    f"(volume {each.volume}){lock}"
                )

    async def _finish(self, record: Record, hold: DiskHold, *, power_off: bool) -> None:
        """Hold the disk of released volumes, publish them, and power it off or give it back."""
        volume, late = record.volume, record.status.publish_late
        if not hold.is_held:
            try:
                await hold.hold(volume, late)
            except (HotplugError, OSError) as error:
                self._note_lost(volume.id.diskseq, error)
                self._revoke(volume.id.diskseq, f"it is not safe to remove any more: {error}")
                raise _not_safe(volume, error) from error
        if self._holds.get(volume.id.diskseq) is not hold or record.stop.is_set:
            if self._is_closed:
                with suppress(HotplugError, OSError):  # the next start tries that again
                    await hold.restore(volume, late)
            raise RequestRefusedError(f"eject {volume}: it is being released: {record.stop.words}")
        for each in self._volumes.records_of(volume.id.diskseq):
            each.repark(State.EJECTED, SAFE, is_held=power_off)
        try:
            await (hold.power_off(late) if power_off else hold.give_back(late))
        except HotplugError as error:
            raise RequestRefusedError(f"{volume} is ejected; {error}") from error

    async def _restore(self, record: Record, hold: DiskHold) -> None:
        """Have the kernel read the partitions, and note where the volumes are now."""
        diskseq = record.volume.id.diskseq
        there = {v.id: v for v in await hold.restore(record.volume, record.status.publish_late)}
        for each in self._volumes.records_of(diskseq):
            if each.volume.id in there:
                each.relocate(there[each.volume.id])
        self._revoke(diskseq, "another volume of its medium was unlocked")
        self._end_absent(diskseq)

    def _note_lost(self, diskseq: int, error: Exception | None) -> None:
        for record in self._volumes.records_of(diskseq):
            if record.parked is not None:
                record.note_lost(error)

    def _revoke(self, diskseq: int, why: str) -> None:
        """Publish the disk's volumes as locked, if they were published as safe to remove."""
        for record in self._volumes.records_of(diskseq):
            if record.status.state is State.EJECTED:
                record.repark(State.LOCKED, why)

    def _end_absent(self, diskseq: int, but: Set[VolumeId] = frozenset()) -> None:
        """End volumes of which the kernel has no partition; if it has one later, it is locked."""
        records = self._volumes.records_of(diskseq)
        there = {r.volume.id for r in records if self._context.kernel.is_present(r.volume)}
        self._volumes.depart(diskseq, but=there | but)

    async def _to_the_end(
        self, volume: Volume, hold: DiskHold, work: Coroutine[Any, Any, None]
    ) -> None:
        """Have the work done to its end, and answer the client if it still waits."""
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        async def answered() -> None:
            error: Exception | None = None
            try:
                await work
            except Exception as refusal:  # noqa: BLE001  a defect too concerns the client, and no volume
                error = refusal
            await self._end(volume, hold)
            if ended.done():
                return
            if error is None:
                ended.set_result(None)
            else:
                ended.set_exception(error)

        self._volumes.run(answered(), lambda: f"{volume}: {hold.step}")
        await ended


def _not_safe(volume: Volume, error: Exception) -> RequestRefusedError:
    words = f"eject {volume}: it is locked, but not safe to remove: "
    if isinstance(error, VolumeBusyError):
        return VolumeBusyError(words + error.what, error.holders)
    if isinstance(error, WritesLostError):
        return WritesLostError(f"{words}{error}")
    return RequestRefusedError(f"{words}{error}")


def _ignore_late(_why: str | None) -> None:
    """No volume waits for this call."""
