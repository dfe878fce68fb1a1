"""Why a volume's lifecycle is to end, and waiting for that or for something else."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any, Final


class Reason(Enum):
    """Why a volume is released without a request."""

    GONE = "its medium has gone"
    OTHER_KEY = "its key was lost in the machine's sleep, so all reads and writes were stopped"
    OTHER_MEDIUM = "another medium took its place in the machine's sleep, so nothing is written"
    OTHER_TABLE = "somebody else has changed the table of its mapping, so nothing is written by it"
    OFFLINE = "the kernel has taken its disk offline, so nothing is written any more"
    STOP = "the agent stops"
    KEEP = "the agent stops and keeps it"


_IN_SLEEP: Final = frozenset({Reason.OTHER_KEY, Reason.OTHER_MEDIUM})
IS_THERE: Final = frozenset({Reason.OTHER_TABLE, Reason.OFFLINE})
"""Reasons that end the service of a medium that is there, and was not exchanged."""
_CUT_OFF: Final = _IN_SLEEP | IS_THERE
LOSES_DATA: Final = IS_THERE | {Reason.OTHER_KEY}
"""Reasons for which the medium, which is there, lacks what was not written to it yet."""


class StopRequestedError(Exception):
    """Raised between two operations when the lifecycle is to end."""


class StopSignal:
    """Set once; only the loss of the medium or its key overrides an earlier reason.

    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self.when_gone: Callable[[], None] = lambda: None
        """Called when the medium departs, before anybody is woken."""
        self._woken = asyncio.Event()

    @property
    def is_set(self) -> bool:
        """Whether the lifecycle is to end."""
        return self.reason is not None

    @property
    def medium_gone(self) -> bool:
        """Whether the medium has departed, or must not be written to, so that nothing waits."""
        return self.reason is Reason.GONE or self.is_cut_off

    @property
    def is_cut_off(self) -> bool:
        """Whether the medium is there, and all I/O of the mapping was stopped."""
        return self.reason in _CUT_OFF

    @property
    def lost_in_sleep(self) -> bool:
        """Whether the medium is there, and key or medium were exchanged while the machine slept."""
        return self.reason in _IN_SLEEP

    @property
    def keeps(self) -> bool:
        """Whether mapping and mount stay, for the next run of the agent to adopt."""
        return self.reason is Reason.KEEP

    @property
    def words(self) -> str:
        """The reason in words, empty while there is none."""
        return self.reason.value if self.reason is not None else ""

    def set(self, reason: Reason) -> None:
        """End the lifecycle for this reason."""
        overrides = reason is Reason.GONE or (reason in _CUT_OFF and not self.medium_gone)
        if self.reason is None or overrides:
            self.reason = reason
        if self.medium_gone:
            self.when_gone()
        self.wake()

    def check(self) -> None:
        """Raises: StopRequestedError if the lifecycle is to end."""
        if self.is_set:
            raise StopRequestedError

    def wake(self) -> None:
        """Have every waiter check its condition again."""
        self._woken.set()

    async def unless_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """Await the work; cancel it when the medium departs."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self.wake())
        try:
            while not (task.done() or self.medium_gone):
                self._woken.clear()
                await self._woken.wait()
        finally:
            task.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the condition holds or the lifecycle is to end; `wake` has it checked."""
        while not (self.is_set or condition()):
            self._woken.clear()
            await self._woken.wait()
