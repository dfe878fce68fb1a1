"""A loop whose time passes only when a test lets it; it detects that nothing is left to do."""

from __future__ import annotations

import asyncio
import selectors
from typing import Any


class _Selector(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """Selector that polls without waiting; the loop decides what to do when no event is ready."""

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
    """Loop without real time: hours pass at once, in the right order."""

    def __init__(self) -> None:
        self._now = 0.0
        self._settling: list[asyncio.Future[None]] = []
        self.threads = 0
        """Number of calls that run in threads. Only for these does the loop really wait."""
        selector = _Selector()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        """Return the seconds that tests have let pass."""
        return self._now

    async def until_settled(self) -> None:
        """Wait until only an outside event or a timer can continue the loop."""
        future = self.create_future()
        self._settling.append(future)
        await future

    def idle(self, until_next: float | None) -> None:
        """Wake the callers of `until_settled`; without any, advance to the next timer."""
        if self._settling:
            settling, self._settling = self._settling, []
            for future in settling:
                if not future.done():
                    future.set_result(None)
        elif until_next is None:
            raise RuntimeError("this will never happen: nothing is left that could bring it about")
        else:
            self._now += until_next
