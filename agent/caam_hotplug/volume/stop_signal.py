"""Why a volume's life is to end, and waiting for that or for news."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from enum import Enum
from typing import Any


class Reason(Enum):
    """Why a volume is let go."""

    GONE = "its medium has gone"
    STOP = "the agent stops"
    KEEP = "the agent stops and keeps it"


class StopRequestedError(Exception):
    """Raised between two steps when the volume is to be let go."""


class StopSignal:
    """Set once; only the medium's departure overrides what was asked before.

    Synchronization: loop only.
    """

    def __init__(self) -> None:
        self.reason: Reason | None = None
        self._stirred = asyncio.Event()

    @property
    def asked(self) -> bool:
        """Whether the life is to end."""
        return self.reason is not None

    @property
    def gone(self) -> bool:
        """Whether there is no medium any more that could be waited for."""
        return self.reason is Reason.GONE

    @property
    def keeps(self) -> bool:
        """Whether what is held is left as it is, for the next run of the agent to adopt."""
        return self.reason is Reason.KEEP

    def ask(self, reason: Reason) -> None:
        """The life is to end, for this reason."""
        if self.reason is None or reason is Reason.GONE:
            self.reason = reason
        self.stir()

    @property
    def why(self) -> str:
        """The reason in words, empty while there is none."""
        return self.reason.value if self.reason is not None else ""

    def check(self) -> None:
        """Raises: LeaveRequestedError if the life is to end."""
        if self.asked:
            raise StopRequestedError

    def stir(self) -> None:
        """Whoever waits looks again."""
        self._stirred.set()

    async def unless_gone(self, work: Coroutine[Any, Any, None]) -> None:
        """The work has ended; or there is no medium any more, and it was broken off."""
        task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self.stir())
        try:
            while not (task.done() or self.gone):
                self._stirred.clear()
                await self._stirred.wait()
        finally:
            task.cancel()

    async def until(self, condition: Callable[[], bool]) -> None:
        """The condition holds or the life is to end; looked at whenever something stirs."""
        while not (self.asked or condition()):
            self._stirred.clear()
            await self._stirred.wait()
