"""The phase that follows a release or a failure, with the state and the answer to a request."""

from __future__ import annotations

import logging
from dataclasses import replace

from caam_hotplug.errors import ForeignMappingError, HotplugError, ReleaseError
from caam_hotplug.model import State
from caam_hotplug.volume.holding import Interference
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.leftovers import Leftover
from caam_hotplug.volume.obstacles import obstacle_of
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.phases import Idle, Parked, Phase
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.remains import remains
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

    def failed(self, error: Exception) -> Phase:
        """Publish why an attempt has failed, unless the medium was pulled meanwhile."""
        if self._stop.medium_gone or not self._kernel.is_present(self._record.volume):
            # A medium that is pulled makes the current operation fail; nothing is wrong with it.
            log.warning("%s: pulled meanwhile: %s", self._record.volume, error)
            return self._phase.to_idle()
        words = f"{error}{self._record.retry_if_passing(error)}"
        self._status.publish(State.FAILED, with_loss(words, self._record.lost))
        is_foreign = isinstance(error, ForeignMappingError)
        return self._phase.to_idle(obstacle_of(error, self._kernel), is_foreign=is_foreign)

    async def released_for(self, cause: Request | Reevaluate | Interference) -> Phase:
        """Park the volume or evaluate it again; if others still hold the mapping, it has failed."""
        if (left := await remains(self._record, self._operations, cause)) is None:
            self._record.phase = replace(self._phase, has_leftover=False)
            return self._phase.to_evaluate() if isinstance(cause, Reevaluate) else self.park(cause)
        self._status.publish(left.state, left.words)
        self._inbox.refuse(left.words)
        if not left.is_known:
            return self._with_leftover()
        self._inbox.discard_facts()  # they were for the volume as it was held
        return replace(self._phase.to_idle(), has_leftover=True, released_for=cause)

    def _with_leftover(self) -> Phase:
        phase = self._phase if isinstance(self._phase, Parked) else self._phase.to_idle()
        return replace(phase, has_leftover=True)

    async def release_for(self, request: Request) -> Phase:
        """Release leftovers on request: this lifecycle itself holds nothing."""
        if not self._phase.has_leftover:
            return self.park(request)
        try:
            if isinstance(self._phase, Idle):  # it may be in use, and was never released
                await self._leftover.require_releasable()
            await self._leftover.release()
        except ReleaseError as error:
            idle = self.badly_released(str(error))
            self._inbox.refuse(str(error))
            return idle
        except (HotplugError, OSError) as error:  # nothing has changed
            self._inbox.refuse(error)
            return self._phase
        return await self.released_for(request)

    def park(self, cause: Request | Interference | StopSignal) -> Phase:
        if self._record.parked is None or self._status.state is not State.EJECTED:  # which is more
            self._record.park(State.LOCKED, cause.words)
        if self._inbox.wants_release:
            self._inbox.grant()
        return self._phase

    async def release_at_end(self) -> None:
        """Release leftovers, also a mapping that could not be adopted."""
        if not self._phase.has_leftover or self._stop.keeps:
            return
        try:
            await self._leftover.release()
        except ReleaseError as error:
            self._record.phase = self.badly_released(str(error))
            if await self._record.may_release_again(error):
                await self.release_at_end()

    def badly_released(self, words: str) -> Phase:
        """Publish why a release has failed: the kernel may have a leftover of it."""
        # Without its medium the volume cannot be `failed`; only the remains are there.
        gone = self._stop.medium_gone and self._stop.reason not in IS_THERE
        state = State.REMOVED_UNSAFELY if gone else State.FAILED
        self._status.publish(state, with_loss(words, self._record.lost))
        return self._with_leftover()
