"""One activation of a volume: mapping and mount, from the unlock to the release."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace

from caam_hotplug.config.rules import Action
from caam_hotplug.errors import HotplugError, ReleaseError, WritesLostError
from caam_hotplug.model import Mapping, State
from caam_hotplug.volume.device import Device
from caam_hotplug.volume.facts import contradict
from caam_hotplug.volume.holding import Interference
from caam_hotplug.volume.hooks import Hooks
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.mapping import active_mapping, backend_that_made
from caam_hotplug.volume.mount import mounted
from caam_hotplug.volume.observation import Observation
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.release import release
from caam_hotplug.volume.remains import LOST
from caam_hotplug.volume.requests import Ask, Request
from caam_hotplug.volume.sleep_check import SleepCheck
from caam_hotplug.volume.stop_signal import LOSES_DATA
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.writes import Writes, watched

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Released:
    """The end of an activation without an error."""

    cause: Request | Reevaluate | Interference | None
    """Why it was released in order; None if nobody has asked for that."""
    loses_data_if_gone: bool = False
    """Whether it is still mounted read-write, so that a departure of the medium costs data."""
    is_kept: bool = False
    """Whether mapping and mount stay, for the next run of the agent."""


class Activation:
    """Mapping and mount of one volume while they are held. Synchronization: loop only."""

    def __init__(
        self, record: Record, operations: Operations, device: Device, target: Target
    ) -> None:
        self._record = record
        self._device = device
        self._operations = operations
        self._target = target
        self._status, self._inbox, self._stop = record.status, record.inbox, record.stop
        self._sleep_check = SleepCheck(operations, target.volume)
        self._hooks = Hooks(record.context.units, self._stop)
        self._writes = Writes()
        self._holding = record.holding
        self._observation = Observation(record, operations, target, self._writes)

    async def run(self) -> Released:
        """Hold mapping and mount until a cause to release them, and release them.

        Raises: HotplugError, OSError if an operation fails; ReleaseError if a release does.
        """
        try:
            released = await self._held()
            # By another mount namespace it may have become writable, which nothing reports.
            lost = released.loses_data_if_gone or self._writes.was_writable
            return replace(released, loses_data_if_gone=lost)
        except ReleaseError:
            if self._holding.is_writable and self._stop.reason in LOSES_DATA:
                self._record.note_lost(WritesLostError(LOST))
            self._record.phase = replace(self._record.phase, has_leftover=True)
            raise
        finally:
            self._holding.release()
            self._record.note_lost(self._writes.error)

    async def _held(self) -> Released:
        self._operations.took = {}
        async with AsyncExitStack() as held:
            mounts = self._target.plan.rule.action is not Action.UNLOCK and self._record.mounts
            watch, made_for = self._holding.watch, (self._operations, self._device, self._target)
            mapping = await held.enter_async_context(
                active_mapping(*made_for, watch, is_read=mounts)
            )
            self._holding.begin(mapping)
            by = f", by its {backend_that_made(mapping)} key"
            live = {"mapping_name": mapping.name, "mapping_node": mapping.node}
            if not mounts:
                writes = watched(self._operations, mapping, self._writes)
                await held.enter_async_context(writes)
                self._observation.begin_for_others(steps=dict(self._operations.took), **live)
                self._grant_unless_released()
            elif (change := self._record.take_reason_to_release(self._target)) is not None:
                self._inbox.note(change)  # nothing is mounted yet: the rules are matched again
                return Released(None)
            else:
                self._status.publish(State.MOUNTING, f"from {mapping.node}{by}", **live)
                await self._mount(mapping, held)
            self._record.has_slept = False
            await self._sleep_check.catch_up(mapping)
            cause = await self._until_released(mapping)
            is_writable = await self._may_lack_writes()
            if isinstance(cause, Interference):  # which flushes nothing
                return Released(cause, is_writable)
            if cause is not None:  # flushed and unmounted already, if the medium was there
                return Released(cause, is_writable and self._stop.medium_gone)
            if self._stop.keeps:
                return Released(None, is_writable, is_kept=True)
            self._status.publish(State.DETACHING, self._stop.words)
            await self._hooks.unmounting(self._record.plan_in_force(self._target))
            await self._prepare_flush()
            return Released(None, is_writable)

    async def _may_lack_writes(self) -> bool:
        """Return whether something may have been written that has not reached the medium.

        What somebody else has unmounted may still be written, as by programs after `umount -l`.
        """
        holding = self._holding
        if holding.is_writable or self._writes.lost:
            return True
        if holding.found is not None or not holding.was_writable:
            return False
        look, uuid = self._operations.kernel.find_mapping, self._target.dm_uuid
        try:
            left = await self._operations.dm("look for the mapping", look, uuid)
        except (HotplugError, OSError):
            return True
        return left is not None and left.open_count > self._writes.holds

    async def _mount(self, mapping: Mapping, held: AsyncExitStack) -> None:
        """Mount the filesystem, and publish that."""
        mount = await held.enter_async_context(
            mounted(self._operations, self._target, mapping, self._writes)
        )
        self._holding.publish(mount)
        self._observation.publish(steps=dict(self._operations.took))
        self._grant_unless_released()
        self._hooks.mounted(self._record.plan_in_force(self._target))

    def _grant_unless_released(self) -> None:
        if not self._inbox.wants_release:
            self._inbox.grant()

    async def _until_released(self, mapping: Mapping) -> Request | Reevaluate | Interference | None:
        """Wait for a cause to release the volume until nobody uses it; None at the stop signal."""
        inbox, record, holding = self._inbox, self._record, self._holding
        while True:
            await inbox.until(lambda: inbox.concerns_active or record.has_slept or holding.differs)
            await self._compare_if_it_slept()
            if self._stop.is_set:
                return None
            asks_for_it = inbox.wants_service
            if asks_for_it:  # it is mounted or unlocked already, as far as is known
                holding.want_look()
            if holding.differs:
                found = await self._observation.compare()
                if found is not None and not self._stop.is_set:
                    self._record.note_release(found.words)  # it is not mounted any more
                    await self._release(mapping, found)
                    return found
                if asks_for_it and not self._stop.is_set:
                    self._grant_unless_released()
                record.has_slept |= self._sleep_check.is_due  # it may be resumed now
                await self._catch_up(mapping)
                continue
            cause = self._inbox.request or await self._reason_to_release()
            if cause is not None and await self._release(mapping, cause):
                return cause

    async def _compare_if_it_slept(self) -> None:
        if self._record.has_slept and not self._stop.medium_gone:
            self._record.has_slept = False
            await self._sleep_check.run()

    async def _prepare_flush(self) -> None:
        """Resume a suspended mapping, and compare it if the machine has slept, before a flush."""
        await self._observation.prepare_flush()
        self._record.has_slept |= self._sleep_check.is_due
        await self._compare_if_it_slept()

    async def _catch_up(self, mapping: Mapping) -> None:
        """Do what was not possible while it was suspended, unless it has slept again meanwhile."""
        if not (self._record.has_slept or self._stop.medium_gone):
            await self._sleep_check.catch_up(self._holding.mapping or mapping)

    async def _reason_to_release(self) -> Reevaluate | None:
        """Take out what has changed; what udev says of the disk counts only if the disk agrees."""
        record, target = self._record, self._target
        change = record.take_reason_to_release(target)
        if change is None or not contradict(record.volume, target.volume):
            return change
        return None if await self._device.confirms(target) else change

    async def _release(self, mapping: Mapping, cause: Request | Reevaluate | Interference) -> bool:
        """Flush and unmount for this cause; False if its users or the stop signal prevent it."""
        self._holding.is_paused = True
        self._status.publish(State.DETACHING, cause.words)
        await self._hooks.unmounting(self._record.plan_in_force(self._target))
        await self._compare_if_it_slept()  # before a flush
        if self._stop.medium_gone or self._stop.keeps:
            return False
        is_marked = isinstance(cause, Request) and self._holding.mount is not None
        try:
            if not await self._flush_and_unmount(mapping, cause, is_marked=is_marked):
                return False
        except (HotplugError, OSError) as error:
            self._record.note_lost(self._writes.error or error)  # flushed, then in use
            if is_marked:
                self._record.unpark(mounts=self._record.mounts)
            if cause is Reevaluate.UDEV or isinstance(cause, Interference):
                # It should not be served, or is not: the unwinding detaches it.
                log.warning("%s: %s: %s", self._record.volume, cause.words, error)
                await self._prepare_flush()
                return True
            if not self._stop.is_set:
                self._observation.go_on()
                if self._holding.mount is not None:
                    self._hooks.mounted(self._record.plan_in_force(self._target))
                self._refuse(cause, error)
            return False
        return True

    async def _flush_and_unmount(
        self, mapping: Mapping, cause: Request | Reevaluate | Interference, *, is_marked: bool
    ) -> bool:
        """Release it, and remember that; False if its medium has gone before. Raises: as `release`.

        `is_marked`: before. A mount ends the mark, which so says that the unmount has been.
        """
        await self._observation.require_running()
        self._record.has_slept |= self._sleep_check.is_due  # it may be resumed since
        await self._compare_if_it_slept()
        if self._stop.medium_gone:
            return False
        if is_marked:
            self._record.note_release(cause.words)
        by_rule = self._record.plan_in_force(self._target).rule.on_busy
        on_busy = by_rule if isinstance(cause, Request) else cause.on_busy
        anyway = isinstance(cause, Request) and cause.ask is Ask.LOCK
        await release(self._operations, self._target, mapping, self._writes, on_busy, anyway=anyway)
        if isinstance(cause, Request) and not is_marked:
            self._record.note_release(cause.words)
        return True

    def _refuse(self, cause: Request | Reevaluate | Interference, error: Exception) -> None:
        if isinstance(cause, Request):
            self._inbox.refuse(error)
        else:
            log.warning("%s: %s: %s", self._record.volume, cause.words, error)
