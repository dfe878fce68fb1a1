"""A loop whose time passes only when a test lets it, and which knows when nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Looks for events without waiting; the loop decides what an empty look means."""

    loop: Clock

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if self.loop.threads:
            return super().select(60)
        self.loop.idle(timeout)
        return []


class Clock(asyncio.SelectorEventLoop):
    """Nothing here waits for real time. Hours pass at once, in the right order."""

    def __init__(self) -> None:
        self._now = 0.0
        self._settling: list[asyncio.Future[None]] = []
        self.threads = 0
        """How many calls are under way in threads, for which alone the loop really waits."""
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """The seconds that tests have let pass."""
        return self._now

    async def settled(self) -> None:
        """Nothing happens any more that is not waiting for the outside, or for time to pass."""
        future = self.create_future()
        self._settling.append(future)
        await future

    def idle(self, until_next: float | None) -> None:
        """Nothing is ready: whoever waits for that goes on, else time passes to the next timer."""
        if self._settling:
            settling, self._settling = self._settling, []
            for future in settling:
                if not future.done():
                    future.set_result(None)
        elif until_next is None:
            raise RuntimeError("this will never happen: nothing is left that could bring it about")
        else:
            self._now += until_next
