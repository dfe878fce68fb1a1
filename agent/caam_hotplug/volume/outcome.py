"""The phase that follows a release or a failure, with the state and the answer to a request."""

from __future__ import annotations

import logging
from dataclasses import replace

from caam_hotplug.errors import (
    BlobMissingError,
    ForeignMappingError,
    HotplugError,
    MountPointOccupiedError,
    ReleaseError,
    SuspendedError,
)
from caam_hotplug.model import State
from caam_hotplug.volume.holding import Interference, UnfinishedRelease
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.leftovers import Leftover
from caam_hotplug.volume.obstacles import OF_BLOBS, Obstacle, obstacle_of, state_of
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.phases import Cause, Failure, Idle, Parked, Phase, Queued
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.remains import remains, with_leftover
from caam_hotplug.volume.requests import Request
from caam_hotplug.volume.status import with_loss
from caam_hotplug.volume.stop_signal import IS_THERE, StopSignal

log = logging.getLogger(__name__)


class Outcome:
    """What follows for one volume once it is released, or has failed. Synchronization: loop only.

    Its lifecycle holds nothing then; the kernel may have a leftover, which is released here.
    """

    def __init__(self, record: Record, operations: Operations, leftover: Leftover) -> None:
        self._record = record
        self._operations = operations
        self._leftover = leftover
        self._kernel = operations.kernel
        self._status, self._stop, self._inbox = record.status, record.stop, record.inbox

    @property
    def _phase(self) -> Phase:
        return self._record.phase

    async def failed(self, error: Exception) -> Phase:
        """Publish why an attempt has failed, unless the medium was pulled meanwhile."""
        if self._stop.medium_gone or not self._kernel.is_present(self._record.volume):
            # A medium that is pulled makes the current operation fail; nothing is wrong with it.
            log.warning("%s: pulled meanwhile: %s", self._record.volume, error)
            return self._phase.to_idle()
        words = with_loss(f"{error}{self._record.retry_if_passing(error)}", self._record.lost)
        obstacle = obstacle_of(error, self._kernel)
        if isinstance(error, ForeignMappingError | SuspendedError):
            self._obstructed(self._phase.to_idle(obstacle, is_foreign=True))
            self._status.publish(State.FAILED, words)
            return self._phase
        return await self._unserved(Failure(words, obstacle=obstacle))

    async def waits(self, error: BlobMissingError | MountPointOccupiedError) -> Phase:
        """Publish what the volume waits for."""
        obstacle = obstacle_of(error, self._kernel)
        return await self._unserved(Failure(str(error), state_of(error), obstacle))

    async def queues(self, words: str, facts: dict[str, str]) -> Phase:
        """Publish whose mount point it waits for, and what is left of it meanwhile."""
        left = None
        if self._phase.has_leftover:
            cause = Failure(words, State.CONFLICT)
            left = await remains(self._record, self._operations, cause)
        self._status.publish(State.CONFLICT, words if left is None else left.words, **facts)
        return replace(self._phase, has_leftover=left is not None)

    async def _unserved(self, cause: Failure) -> Phase:
        """Publish why it is not served, and who holds what the attempt has made, until they end."""
        idle = self._phase.to_idle(cause.obstacle)
        self._obstructed(idle)
        if not self._record.cut_off.is_mapped:
            self._status.publish(cause.state, cause.words)
            return idle
        left = await remains(self._record, self._operations, cause)
        if left is None or not left.is_known:
            self._status.publish(cause.state, cause.words)
            return replace(idle, has_leftover=left is not None)
        self._status.publish(left.state, left.words)
        return replace(idle, has_leftover=True, released_for=cause)

    def _obstructed(self, idle: Idle) -> None:
        """Note what is in the way at once: reports may come while the kernel is asked for more.

        What was reported during the attempt may say that it has gone.
        """
        self._record.phase = idle
        has_new_blob = Obstacle.ANY_BLOB in idle.obstacle and self._inbox.has_new_blob
        if has_new_blob or (idle.obstacle & ~OF_BLOBS and self._inbox.is_reported):
            self._inbox.note(Reevaluate.FACTS)

    async def released_for(self, cause: Cause) -> Phase:
        """Park the volume or evaluate it again; if others still hold the mapping, it has failed."""
        if isinstance(cause, Failure):
            return await self._unserved(cause)
        if (left := await remains(self._record, self._operations, cause)) is None:
            self._record.phase = replace(self._phase, has_leftover=False)
            if isinstance(cause, UnfinishedRelease):  # others may have ended what a release has not
                await self._leftover.remove_mount_points()
            return self._phase.to_evaluate() if isinstance(cause, Reevaluate) else self.park(cause)
        self._status.publish(left.state, left.words)
        if self._inbox.wants_release or isinstance(self._phase, Queued):
            self._inbox.refuse(left.words)  # else its lifecycle makes an attempt for the request
        if not left.is_known:
            return self._with_leftover()
        self._inbox.discard_facts()  # they were for the volume as it was held
        return replace(self._phase.to_idle(), has_leftover=True, released_for=cause)

    def _with_leftover(self) -> Phase:
        phase = self._phase if isinstance(self._phase, Parked) else self._phase.to_idle()
        return replace(phase, has_leftover=True, released_for=self._record.released)

    async def release_for(self, request: Request) -> Phase:
        """Release leftovers on request: this lifecycle itself holds nothing."""
        if not self._phase.has_leftover:
            return self.park(request)
        try:
            if isinstance(self._phase, Idle):  # it may be in use, and was never released
                await self._leftover.require_releasable()
            self._record.note_release(request.words)
            await self._leftover.release()
        except ReleaseError as error:
            self._inbox.refuse(str(error))
            return await self.badly_released(str(error))
        except (HotplugError, OSError) as error:  # nothing has changed
            self._inbox.refuse(error)
            return self._phase
        return await self.released_for(request)

    def park(self, cause: Request | Interference | UnfinishedRelease | StopSignal) -> Phase:
        if self._record.parked is None or self._status.state is not State.EJECTED:  # which is more
            self._record.park(State.LOCKED, cause.words)
        if self._inbox.wants_release:
            self._inbox.grant()
        return self._phase

    async def release_at_end(self) -> None:
        """Release leftovers, also a mapping that could not be adopted."""
        while self._phase.has_leftover and not self._stop.keeps:
            try:
                await self._leftover.release()
            except ReleaseError as error:
                self._record.phase = await self.badly_released(str(error))
                self._inbox.refuse(str(error))  # what was asked before the end, and not done
                if await self._record.may_release_again(error):
                    continue
            return

    async def badly_released(self, words: str) -> Phase:
        """Publish why a release has failed: the kernel may have a leftover of it."""
        # Without its medium the volume cannot be `failed`; only the remains are there.
        gone = self._stop.medium_gone and self._stop.reason not in IS_THERE
        state = State.REMOVED_UNSAFELY if gone else State.FAILED
        said = words if gone else await with_leftover(self._record, self._operations, words)
        self._status.publish(state, with_loss(said, self._record.lost))
        phase = self._with_leftover()
        if gone or phase.released_for is not None:
            return phase
        return replace(phase, released_for=Failure(words))  # so that its removal is said
