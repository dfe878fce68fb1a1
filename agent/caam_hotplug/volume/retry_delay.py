"""How long to wait before something is tried again that fails only for now."""

from __future__ import annotations

import asyncio
import math

from caam_hotplug.kernel.unknown import FIRST_DELAY_S, LONGEST_DELAY_S


class RetryDelay:
    """Doubles from attempt to attempt, up to 30 s; begins anew after a while. Loop only."""

    def __init__(self) -> None:
        self._asked_at, self._s = -math.inf, 0.0

    def next_s(self) -> float:
        """Return the seconds to wait before the next attempt."""
        now = asyncio.get_running_loop().time()
        is_first = now - self._asked_at > 2 * LONGEST_DELAY_S
        self._s = FIRST_DELAY_S if is_first else min(2 * self._s, LONGEST_DELAY_S)
        self._asked_at = now
        return self._s
