"""How the steps of one volume are taken: on its own lane, or on the one lane of all mappings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from caam_hotplug import trace
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.volume.stop_signal import StopSignal
from caam_hotplug.volume.worker import Late, Worker

T = TypeVar("T")
Step = tuple[str, Callable[[], Any]]
"""What it is, in words, and what does it."""


def fields(event: str, **of_it: object) -> dict[str, dict[str, object]]:
    """What a log record has for the journal beside its words; `extra` takes it there."""
    return {"fields": {"EVENT": event, **of_it}}


@dataclass(slots=True)
class Operations:
    """The kernel, and the ways to it.

    A wedged medium blocks its own lane only. libdevmapper is not thread-safe, so calls about
    mappings share one lane, and are short.
    """

    kernel: Kernel
    stop_signal: StopSignal
    worker: Worker
    dm_worker: Worker
    late: Late
    """Told which step takes long and why, and None when it has ended."""
    took: dict[str, float] = field(default_factory=dict)
    """How long each step took of late, in seconds with its wait for a turn."""

    async def call(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the volume's own lane."""
        return await self._timed(self.worker, words, function, *args, **named)

    async def dm(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """The step's outcome, on the lane of all mappings."""
        return await self._timed(self.dm_worker, words, function, *args, **named)

    async def each(self, *steps: Step) -> list[Any]:
        """The steps' outcomes, taken one after the other up to the first that fails.

        On the volume's own lane, which they go to and come back from once.
        """
        return await self._in_one_go(self.worker, steps)

    async def dm_each(self, *steps: Step) -> list[Any]:
        """As `each`, on the lane of all mappings."""
        return await self._in_one_go(self.dm_worker, steps)

    async def _in_one_go(self, worker: Worker, steps: Sequence[Step]) -> list[Any]:
        going = _Going(steps, asyncio.get_running_loop().time)
        try:
            late = self._late(lambda: going.words)
            with trace.step(f"{steps[0][0]} and more", worker.name):
                return await worker.run(going, late=late, since=lambda: going.since)
        finally:
            for words, took in going.took:
                self.took[words] = self.took.get(words, 0.0) + took

    async def _timed(
        self, worker: Worker, words: str, function: Callable[..., T], *args: Any, **named: Any
    ) -> T:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            with trace.step(words, worker.name):
                return await worker.run(function, *args, late=self._late(lambda: words), **named)
        finally:
            self.took[words] = self.took.get(words, 0.0) + clock() - begun

    def _late(self, words: Callable[[], str]) -> Late:
        return lambda why: self.late(None if why is None else f"{words()}: {why}")


class _Going:
    """Steps that are taken one after the other in one call, which can be watched meanwhile.

    Called again after a step that did not end, as a lane in tests may, it goes on with that one.
    """

    def __init__(self, steps: Sequence[Step], clock: Callable[[], float]) -> None:
        self._steps = steps
        self._clock = clock
        self._begun = self.since = clock()
        self._outcomes: list[Any] = []
        self.took: list[tuple[str, float]] = []
        """How long each step took, the first with its wait for a turn."""

    @property
    def words(self) -> str:
        """What the step is that is taken now. Any thread."""
        return self._steps[min(len(self._outcomes), len(self._steps) - 1)][0]

    def __call__(self) -> list[Any]:
        for words, function in self._steps[len(self._outcomes) :]:
            self.since = self._clock()
            try:
                with trace.span(words):
                    self._outcomes.append(function())
            finally:
                ended = self._clock()
                self.took.append((words, ended - self._begun))
                self._begun = ended
        return self._outcomes
