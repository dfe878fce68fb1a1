"""How the steps of one volume are taken: on its own lane, or on the one lane of all mappings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from caam_hotplug import trace
from caam_hotplug.lifecycle.host import Host
from caam_hotplug.lifecycle.lane import Lane, Late
from caam_hotplug.lifecycle.leave import Leave

T = TypeVar("T")


def fields(event: str, **of_it: object) -> dict[str, dict[str, object]]:
    """What a log record has for the journal beside its words; `extra` takes it there."""
    return {"fields": {"EVENT": event, **of_it}}


@dataclass(slots=True)
class Steps:
    """The kernel, and the ways to it.

    A wedged medium blocks its own lane only. libdevmapper is not thread-safe, so calls about
    mappings share one lane, and are short.
    """

    host: Host
    leave: Leave
    lane: Lane
    dm_lane: Lane
    late: Late
    """Told which step takes long and why, and None when it has ended."""
    took: dict[str, float] = field(default_factory=dict)
    """How long each step took of late, in seconds with its wait for a turn."""

    async def call(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the volume's own lane."""
        return await self._timed(self.lane, words, function, *args, **named)

    async def dm(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the lane of all mappings."""
        return await self._timed(self.dm_lane, words, function, *args, **named)

    async def _timed(
        self, lane: Lane, words: str, function: Callable[..., T], *args: Any, **named: Any
    ) -> T:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            with trace.step(words, lane.name):
                return await lane.run(function, *args, late=self._late(words), **named)
        finally:
            self.took[words] = self.took.get(words, 0.0) + clock() - begun

    def _late(self, words: str) -> Late:
        return lambda why: self.late(None if why is None else f"{words}: {why}")
