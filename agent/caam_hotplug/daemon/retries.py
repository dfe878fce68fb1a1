"""Another attempt at something that the kernel refuses for now, after growing pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from caam_hotplug.kernel.unknown import FIRST_DELAY_S, LONGEST_DELAY_S


class Retries:
    """Attempts after 1, 2, 4 … 30 s, until one succeeds. Synchronization: loop only."""

    def __init__(self, attempt: Callable[[], None]) -> None:
        """`attempt` is called for each, and says how it has ended."""
        self._attempt = attempt
        self._alarm: asyncio.TimerHandle | None = None
        self._delay_s = 0.0
        """The last pause; 0 since an attempt has succeeded."""

    def failed(self) -> bool:
        """Have another attempt made; return whether this is the first that has failed.

        One that was made for another reason, before the next is due, makes no pause longer.
        """
        is_first = not self._delay_s
        if self._alarm is None:
            self._delay_s = min(2 * self._delay_s, LONGEST_DELAY_S) or FIRST_DELAY_S
            self._alarm = asyncio.get_running_loop().call_later(self._delay_s, self._try)
        return is_first

    def succeeded(self) -> bool:
        """Have no other attempt made; return whether the one before has failed."""
        self.end()
        is_again, self._delay_s = bool(self._delay_s), 0.0
        return is_again

    def _try(self) -> None:
        self._alarm = None
        self._attempt()

    def end(self) -> None:
        """Have no other attempt made."""
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
