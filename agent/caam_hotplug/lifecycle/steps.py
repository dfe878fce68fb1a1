"""How the steps of one volume are taken: on its own lane, or on the one lane of all mappings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from caam_hotplug.lifecycle.host import Host
from caam_hotplug.lifecycle.lane import Lane
from caam_hotplug.lifecycle.leave import Leave

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Steps:
    """The kernel, and the ways to it.

    A wedged medium blocks its own lane only. libdevmapper is not thread-safe, so calls about
    mappings share one lane, and are short.
    """

    host: Host
    leave: Leave
    lane: Lane
    dm_lane: Lane
    late: Callable[[str, bool], None]
    """Called with the step's words when it takes too long (True), and when it has ended (False)."""

    async def call(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the volume's own lane."""
        return await self.lane.run(function, *args, late=self._late(words), **named)

    async def dm(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the lane of all mappings."""
        return await self.dm_lane.run(function, *args, late=self._late(words), **named)

    def _late(self, words: str) -> Callable[[bool], None]:
        return lambda is_late: self.late(words, is_late)
