"""Another attempt for an idle volume, once what is in its way has gone.

Nothing here polls. The kernel reports a change of mounts, and inotify one in a mount point. One
change leads to one check. What a check cannot tell leads to a few attempts, further and further
apart: a filesystem may be in use for a while after its last mount has left the table of mounts.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from caam_hotplug.errors import HotplugError, UnknownError, UnsafePathError
from caam_hotplug.kernel.api import PathWatch
from caam_hotplug.kernel.unknown import FIRST_DELAY_S, LONGEST_DELAY_S
from caam_hotplug.model import DeviceNumber, State
from caam_hotplug.volume.mount_table import mounts_among, point_of
from caam_hotplug.volume.nesting import why_nested
from caam_hotplug.volume.obstacles import Obstacle
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.phases import Failure
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.retry_delay import RetryDelay
from caam_hotplug.volume.target import Target

log = logging.getLogger(__name__)

_BETWEEN_CHECKS_S: Final = 1.0
_ATTEMPTS_AFTER: Final = 4
"""Further attempts after the one that a change has led to."""


class Lookout:
    """Waits until an idle volume is worth another attempt. Synchronization: loop only."""

    def __init__(self, operations: Operations, record: Record) -> None:
        self._record = record
        self._operations = operations
        self._kernel = operations.kernel
        self._stop, self._inbox, self._status = record.stop, record.inbox, record.status
        self._checked_at = self._tried_at = -math.inf
        self._delay = RetryDelay()
        self._attempts_left = 0
        self._watch: PathWatch | None = None
        self._is_asked: Callable[[], bool] = lambda: True
        """Whether there is a request or a change to act on."""

    async def until_worth_it(self, is_asked: Callable[[], bool]) -> None:
        """Wait for a request or a change, or until what is in the way of the volume has gone."""
        target, obstacle = self._record.phase.target, self._record.obstacle
        watches, holding = Obstacle.MAPPING in obstacle, self._record.holding
        self._is_asked = lambda: is_asked() or (watches and holding.is_mapping_doubted)
        has_obstacle = True
        if target is not None and Obstacle.MOUNT_POINT in obstacle:
            await self._until_free(target)
        elif Obstacle.MOUNTED in obstacle:
            await self._until_unused()
        else:
            has_obstacle = False
            await self._stop.until(self._is_asked)
        if has_obstacle and not self._is_asked():
            await self._pause(self._before_attempt_s())
        self._inbox.mounts_changed = False  # the attempt sees all that has changed so far

    def _before_attempt_s(self) -> float:
        """Return 0 after a while without attempts, and then 1, 2, 4 … 30 s."""
        now = _now()
        is_first, self._tried_at = now - self._tried_at > 2 * LONGEST_DELAY_S, now
        return 0.0 if is_first else self._delay.next_s()

    async def _pause(self, seconds: float) -> None:
        """Wait so long, or for a request or a change."""
        if seconds <= 0:
            return
        over = asyncio.Event()

        def end() -> None:
            over.set()
            self._stop.wake()

        timer = asyncio.get_running_loop().call_later(seconds, end)
        try:
            await self._stop.until(lambda: self._is_asked() or over.is_set())
        finally:
            timer.cancel()

    async def _until_changed(self) -> None:
        """Wait until something has changed, and until the next check is due."""
        await self._stop.until(lambda: self._is_asked() or self._inbox.mounts_changed)
        await self._pause(self._checked_at + _BETWEEN_CHECKS_S - _now())

    # A mount point that is occupied.

    async def _until_free(self, target: Target) -> None:
        try:
            while not (self._is_asked() or self._stop.is_set or await self._is_free(target)):
                await self._until_changed()
        finally:
            self._end_watch()

    async def _is_free(self, target: Target) -> bool:
        """Check whether the mount point is free, and publish what is there now."""
        self._inbox.mounts_changed, self._checked_at = False, _now()
        try:
            words = await self._occupant(target)
        except UnsafePathError:  # of which the last attempt has said the same
            return False
        except (HotplugError, OSError):  # the attempt says it
            return True
        if words and self._status.state is State.CONFLICT:
            self._publish_occupant(words)
        return not words

    def _publish_occupant(self, words: str) -> None:
        """Publish what is there, unless that was; or have it, with who holds the mapping."""
        phase = self._record.phase
        if not isinstance(phase.released_for, Failure):
            if words != self._status.reason:
                self._status.publish(State.CONFLICT, words)
        elif words != phase.released_for.words:
            cause = replace(phase.released_for, words=words)
            self._record.phase = replace(phase, released_for=cause)
            self._record.holding.want_look()

    async def _occupant(self, target: Target) -> str:
        """Return what is there, in words, and watch it. A filesystem is left alone: it may hang."""
        place = target.plan.place
        mounts = self._kernel.mounts()
        if there := mounts_among(mounts, point_of(self._kernel, place)):
            self._end_watch()
            return f"{there[-1].source} is mounted at {there[-1].point}"
        if words := await why_nested(self._operations, target, mounts):
            self._end_watch()
            return words
        self._begin_watch(place)
        ask = self._kernel.why_occupied
        return await self._operations.call("look at the mount point", ask, place)

    def _begin_watch(self, place: str) -> None:
        """Watch the mount point for one change: programs may write there all the time."""
        try:
            if self._watch is None:
                self._watch = self._kernel.watch_mount_point(place)
            self._watch.read()  # what the check is about to see
        except UnknownError as error:
            self._end_watch()
            log.warning("%s; until then, ask for `retry` when %s is free", error, place)
            return
        asyncio.get_running_loop().add_reader(self._watch.fileno(), self._take)

    def _take(self) -> None:
        self._ignore_watch()
        self._inbox.note_mounts()

    def _ignore_watch(self) -> None:
        if self._watch is not None:
            asyncio.get_running_loop().remove_reader(self._watch.fileno())

    def _end_watch(self) -> None:
        self._ignore_watch()
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()

    # A device or filesystem that is in use.

    async def _until_unused(self) -> None:
        """Wait until a filesystem that is mounted now is not mounted any more.

        A change during the attempt may have been that.
        """
        is_due = self._inbox.mounts_changed
        if not is_due and self._attempts_left:
            self._attempts_left -= 1
            return
        before = self._mounted(frozenset())
        while not (is_due or self._is_asked() or self._stop.is_set):
            # Without a pause: a mount may come and go.
            await self._stop.until(lambda: self._is_asked() or self._inbox.mounts_changed)
            now = self._mounted(before)
            is_due, before = not before <= now, now
        if is_due:
            self._attempts_left = _ATTEMPTS_AFTER

    def _mounted(self, before: frozenset[DeviceNumber]) -> frozenset[DeviceNumber]:
        """Return the device numbers of all mounted filesystems that are on a device.

        If they cannot be read, return those before, and look again in a while.
        """
        self._inbox.mounts_changed, self._checked_at = False, _now()
        try:
            mounts = self._kernel.mounts()
        except (HotplugError, OSError):
            asyncio.get_running_loop().call_later(FIRST_DELAY_S, self._inbox.note_mounts)
            return before
        return frozenset(mount.number for mount in mounts if mount.source.startswith("/dev/"))


def _now() -> float:
    return asyncio.get_running_loop().time()
