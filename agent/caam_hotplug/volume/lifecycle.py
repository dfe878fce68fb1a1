"""The lifecycle of one volume, from arrival to departure: one coroutine, one phase at a time.

`VolumeLifecycle.run` is all of it; `phases`: the phases, `record`: the events from outside,
`outcome`: what follows a release or a failure.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from caam_hotplug.config.rules import NoMatch, Plan, match_rules
from caam_hotplug.errors import (
    BLOB_AT_FAULT,
    BlobMissingError,
    DeviceLockedError,
    HotplugError,
    MountPointOccupiedError,
    ReleaseError,
)
from caam_hotplug.model import State, Volume
from caam_hotplug.volume.activation import Activation
from caam_hotplug.volume.device import Device, OtherOnDiskError
from caam_hotplug.volume.holding import Interference
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.leftovers import Leftover
from caam_hotplug.volume.lookout import Lookout
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.outcome import Outcome
from caam_hotplug.volume.phases import Active, Cause, Evaluate, Idle, Parked, Phase, Queued
from caam_hotplug.volume.record import Context, Record
from caam_hotplug.volume.remains import in_words, note_last_writes
from caam_hotplug.volume.requests import Ask, Request
from caam_hotplug.volume.stop_signal import IS_THERE, Reason, StopRequestedError
from caam_hotplug.volume.target import Target

log = logging.getLogger(__name__)


class VolumeLifecycle:
    """The lifecycle of one volume. Synchronization: loop only."""

    def __init__(
        self, context: Context, volume: Volume, phase: Phase | None = None, lost: str = ""
    ) -> None:
        """`phase`, `lost`: how an earlier run has left it, and what that could not write to it."""
        self.record = Record(context, volume, phase or Evaluate(), lost)
        self._context = context
        self._kernel = context.kernel
        self._status, self._stop = self.record.status, self.record.stop
        self._inbox = self.record.inbox
        worker, late = context.new_worker(f"volume {volume.id}"), self._status.publish_late
        self._operations = Operations(
            self._kernel, self._stop, worker, context.dm_worker, late, self.record.cut_off
        )
        self._device = Device(self.record, self._operations)
        self._lookout = Lookout(self._operations, self.record)
        self._leftover = Leftover(self.record, self._operations)
        self._outcome = Outcome(self.record, self._operations, self._leftover)

    async def run(self) -> None:
        """Serve the volume until it departs or the agent stops, and release all that it holds."""
        record = self.record
        try:
            while not self._stop.is_set:
                match record.phase:
                    case Parked():
                        record.phase = await self._wait_parked()
                    case Idle():
                        record.phase = await self._wait_idle()
                    case _:
                        record.phase = await self._evaluate()
            await self._outcome.release_at_end()
            await record.cut_off.done()
            if self._stop.reason is Reason.OFFLINE and not record.is_agent_stopping:
                self._outcome.park(self._stop)
        finally:
            self._inbox.refuse(self._stop.words or "a defect of the agent; its journal says more")
        # A failed release was published; only the departure of the medium overrides it.
        if self._stop.is_cut_off:  # the next lifecycle begins as this one ends
            record.phase = replace(self._phase, has_leftover=record.cut_off.is_mapped)
        if self._status.state is State.REMOVED_UNSAFELY or self._stop.keeps:
            return
        if self._stop.reason is Reason.OTHER_TABLE:
            record.park(State.LOCKED, self._stop.words)
        if isinstance(record.phase, Parked) and self._stop.reason in IS_THERE:
            return
        if self._stop.medium_gone or self._status.state is not State.FAILED:
            self._status.publish(State.GONE)

    async def _wait_parked(self) -> Phase:
        """Stay locked or ejected until there is a request."""
        self._inbox.clear_changes()
        await self._inbox.until(lambda: self._inbox.request is not None)
        request = self._inbox.request
        if request is None or self._stop.is_set:
            return self._phase  # which `Record.repark` may have replaced
        if request.releases:
            return await self._outcome.release_for(request)
        self.record.unpark()
        return self._phase.to_evaluate()

    async def _wait_idle(self) -> Phase:
        """Answer requests while nothing is held, until something is worth another attempt."""
        request = self._inbox.request
        if request is not None and request.releases:
            return await self._outcome.release_for(request)
        if request is not None and not self._inbox.has_changes:
            self._inbox.refuse(self._status.words)
        cause, holding = self._phase.released_for, self.record.holding
        awaits_mapping = isinstance(cause, Request | Interference)
        await self._lookout.until_worth_it(
            lambda: (
                bool(self._inbox.request)
                or (cause is not None and holding.differs)
                or (self._inbox.has_changes and not awaits_mapping)
            )
        )
        if self._inbox.wants_release or self._stop.is_set:
            return self._phase
        cause = self._phase.released_for  # of which the lookout may have seen something else
        if cause is not None and holding.differs:
            return await self._say_what_is_left(cause)
        return self._phase.to_evaluate(goes_on=self._inbox.request is None)

    async def _say_what_is_left(self, cause: Cause) -> Phase:
        """Return the next phase of an idle volume; a request to serve it leads to an attempt."""
        phase = await self._outcome.released_for(cause)
        is_asked = self._inbox.wants_service and isinstance(phase, Idle)
        return phase.to_evaluate() if is_asked else phase

    async def _evaluate(self) -> Phase:
        """Match the rules and do as they say. The only place where the errors of a volume end."""
        if self._inbox.wants_release and self._phase.goes_on_for is None:
            return self._phase.to_idle()
        self._inbox.clear_changes()
        self.record.holding.end()
        udev_before = self.record.udev_status
        try:
            return await self._follow_rules()
        except (StopRequestedError, DeviceLockedError):
            pass
        except OtherOnDiskError as error:
            self._device.follow(error.found)
        except (BlobMissingError, MountPointOccupiedError) as error:
            return await self._outcome.waits(error)
        except ReleaseError as error:
            self.record.retry_if_udev_reported(udev_before)
            words = in_words(error) + self.record.retry_if_passing(error)
            return await self._outcome.badly_released(words)
        except (HotplugError, OSError) as error:
            phase = await self._outcome.failed(error)
            if not isinstance(error, BLOB_AT_FAULT):
                self.record.retry_if_udev_reported(udev_before)
            return phase
        finally:
            await self._device.close()
        return self._phase.to_idle()

    async def _follow_rules(self) -> Phase:
        cause = self._phase.goes_on_for
        is_over = cause is None or self._inbox.wants_service
        if cause is not None and not is_over and await self._leftover.go_on(cause):
            return await self._say_what_is_left(cause)
        if self._inbox.wants_release:
            return self._phase.to_idle()
        await self._device.identify()
        self._inbox.clear_changes()  # the rules are matched with all reports so far
        match match_rules(self._context.rules, self.record.volume):
            case Plan() as plan:
                return await self._reserve(Target(self.record.volume, plan))
            case NoMatch() as why if not self.record.volume.awaits_udev:
                return await self._ignore(why)
        return self._phase.to_idle()  # and publish nothing before udev's report

    @property
    def _phase(self) -> Phase:
        return self.record.phase

    async def _ignore(self, why: NoMatch) -> Phase:
        if self._phase.has_leftover:
            self._leftover.require_refused(why)
            log.warning("%s: no rule matches it any more; releasing it", self.record.volume)
            await self._leftover.release()
            return await self._outcome.released_for(Reevaluate.RULES)
        self._status.publish(State.IGNORED, str(why), rule="", blob="")
        return Idle(target=self._phase.target)

    async def _reserve(self, target: Target) -> Phase:
        """Activate the target once the mount point is free; until then publish the conflict."""
        name, points, me = target.plan.mount_name, self._context.mount_points, target.volume.id
        blob = str(self._kernel.blob_directory / target.plan.blob)
        facts = {"rule": target.plan.rule.name, "blob": blob}
        self.record.phase = Queued(target=target, has_leftover=self._phase.has_leftover)
        with points.reserved(name, me, self._stop.wake):
            while (owner := points.owner(name)) != me:
                words = f"{self._kernel.mount_root / name} belongs to volume {owner}"
                self.record.phase = await self._outcome.queues(words, facts)
                await self._device.close()  # it would keep the disk's table from being read anew
                await self._inbox.until(
                    lambda: (
                        points.owner(name) != owner
                        or self._inbox.concerns_active
                        or self.record.holding.differs
                    )
                )
                self._stop.check()
                if self._inbox.wants_service:
                    self._inbox.refuse(self._status.words)  # and keep the place in the queue
                elif self._inbox.wants_release or self.record.take_reason_to_release(target):
                    return self._phase.to_evaluate()
            if target.volume != self.record.volume:  # other facts may ask for another target
                return self._phase.to_evaluate()
            self._stop.check()
            self._note_how()
            self._status.publish(State.UNLOCKING, f"with {blob}", **facts)
            try:
                return await self._activate(target)
            finally:
                if self._stop.is_set:  # a leftover mount keeps its mount point reserved until then
                    await self._outcome.release_at_end()

    def _note_how(self) -> None:
        request = self._inbox.request
        mounts = request.mounts if request and request.ask is Ask.UNLOCK else self.record.mounts
        if mounts != self.record.mounts or self.record.released:
            self.record.unpark(mounts=mounts)

    async def _activate(self, target: Target) -> Phase:
        has_leftover = self._phase.has_leftover
        self.record.phase = Active(target=target, plan=target.plan, has_leftover=has_leftover)
        try:
            released = await Activation(self.record, self._operations, self._device, target).run()
        finally:
            self._status.forget_mapping()
            self.record.phase = Queued(target=target, has_leftover=self._phase.has_leftover)
        if released.is_kept:  # the medium may depart before the lifecycle has ended
            self.record.phase = Queued(target=target, has_leftover=True)
        if released.loses_data_if_gone and self._stop.medium_gone:
            note_last_writes(self.record)
        elif released.cause is not None and not self._stop.is_set:
            return await self._outcome.released_for(released.cause)
        return self._phase.to_idle()
