"""Requests and changes that the lifecycle has not acted on yet."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Any

from caam_hotplug.config.rules import OnBusy
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.model import Volume
from caam_hotplug.volume.operations import fields
from caam_hotplug.volume.requests import Request
from caam_hotplug.volume.stop_signal import StopSignal

log = logging.getLogger(__name__)


class Reevaluate(Enum):
    """Why the rules are to be matched again, and how an active volume is released for it."""

    FACTS = ("its facts have changed", OnBusy.REFUSE)
    """Acted on when the volume is no longer active."""
    RULES = ("other rules ask for something else", OnBusy.REFUSE)
    UDEV = ("udev reports something else of it than was known", OnBusy.DETACH)
    """It was served before udev's report, and should not have been."""

    def __init__(self, words: str, on_busy: OnBusy) -> None:
        self.words = words
        self.on_busy = on_busy


class Inbox:
    """At most one request, and changes: several of one kind are one. Synchronization: loop only."""

    def __init__(self, stop: StopSignal, volume: Callable[[], Volume]) -> None:
        self._stop = stop
        self._volume = volume
        self._changes: set[Reevaluate] = set()
        self.request: Request | None = None
        self.mounts_changed = False
        """Whether mounts have changed, or what lies in the mount point, since an idle volume was
        last looked at, or its last attempt began."""
        self.is_reported = self.has_new_blob = False
        """Whether the device was reported, or any blob has come, since the rules were matched."""
        self._last_refusal: Exception | None = None

    @property
    def has_changes(self) -> bool:
        """Whether anything has changed since `clear_changes`."""
        return bool(self._changes)

    @property
    def wants_release(self) -> bool:
        """Whether the request is to release the volume."""
        return self.request is not None and self.request.releases

    @property
    def wants_service(self) -> bool:
        """Whether the request is to serve the volume."""
        return self.request is not None and not self.request.releases

    @property
    def concerns_active(self) -> bool:
        """Whether an active volume has to act: on a request, other rules, or udev's report."""
        return self.request is not None or bool(self._changes - {Reevaluate.FACTS})

    def note(self, change: Reevaluate) -> None:
        """Add a change."""
        self._changes.add(change)
        self._stop.wake()

    def note_mounts(self, *, concerns: bool = True) -> None:
        """Note that mounts have changed, or what lies in the mount point.

        `concerns`: the volume waits for that now.
        """
        self.mounts_changed = True
        if concerns:
            self._stop.wake()

    def discard_facts(self) -> None:
        """Forget changed facts: they were of the volume as it was held."""
        self._changes.discard(Reevaluate.FACTS)

    def clear_changes(self) -> None:
        """Forget all changes: the rules are matched before anything else is done."""
        self._changes.clear()
        self.is_reported = self.has_new_blob = False

    def take_change(self) -> Reevaluate | None:
        """Take out what has changed for an active volume; udev's report weighs most."""
        concerning = self._changes - {Reevaluate.FACTS}
        self._changes &= {Reevaluate.FACTS}
        if Reevaluate.UDEV in concerning:
            return Reevaluate.UDEV
        return next(iter(concerning), None)

    def ask(self, request: Request, why_not: str | None) -> None:
        """Add the request. Raises: RequestRefusedError if there is a reason against it."""
        volume, words = self._volume(), request.words
        if why_not is not None:
            refusal = RequestRefusedError(f"{request.ask.value} {volume}: {why_not}")
            self.log_refusal(request, refusal, why_not)
            raise refusal
        log.info("%s: %s", volume, words, extra=self._fields("requested", request))
        self.request = request
        self._stop.wake()

    def grant(self) -> None:
        """Answer the request, if there is one: it is done."""
        request, self.request = self.request, None
        if request is not None:
            request.grant()

    def refuse(self, why: str | Exception) -> None:
        """Answer the request, if there is one: it is not done, and why."""
        request, self.request = self.request, None
        if request is None:
            return
        volume = self._volume()
        if not isinstance(why, RequestRefusedError):
            why = RequestRefusedError(f"{request.ask.value} {volume}: {why}")
        self.log_refusal(request, why)
        request.refuse(why)

    def log_refusal(self, request: Request, error: Exception, words: str = "") -> None:
        """Log that a request is refused, by these words or the error's, unless it was logged."""
        if error is not self._last_refusal:
            self._last_refusal = error
            why = words or str(error)
            extra = self._fields("request-refused", request, REASON=why)
            log.warning("%s: %s: refused: %s", self._volume(), request.words, why, extra=extra)

    def _fields(self, event: str, request: Request, **more: str) -> dict[str, Any]:
        asked, by = request.ask.value, request.by
        return fields(event, REQUEST=asked, REQUESTED_BY=by, VOLUME=self._volume(), **more)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or the lifecycle is to end."""
        await self._stop.until(condition)
