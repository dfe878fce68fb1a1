"""The kernel operations of one volume: on its own worker, or on the one worker of all mappings."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from caam_hotplug.errors import MediumGoneError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.volume.cut_off import CutOff
from caam_hotplug.volume.stop_signal import StopSignal
from caam_hotplug.volume.worker import Late, Observe, Worker

T = TypeVar("T")
Operation = tuple[str, Callable[[], Any]]
"""What it does, in words, and the call."""


def fields(event: str, **more: object) -> dict[str, dict[str, object]]:
    """Return journal fields for `extra` of a log call."""
    return {"fields": {"EVENT": event, **more}}


@dataclass(slots=True)
class Operations:
    """The kernel, and the workers that its calls run on.

    A medium that hangs blocks its own worker only. libdevmapper is not thread-safe, so calls about
    mappings share one worker, and are short.
    """

    kernel: Kernel
    stop: StopSignal
    worker: Worker
    dm_worker: Worker
    late: Late
    """Called with the operation that takes long and why, and with None when it has ended."""
    cut_off: CutOff
    """What precedes every call on the volume's own worker once the medium has gone."""
    took: dict[str, float] = field(default_factory=dict)
    """Duration of each operation in seconds, with its wait for a turn."""

    async def call(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run the function on the volume's own worker."""
        await self.cut_off.until_live()
        return await self._timed(self.worker, words, function, *args, **named)

    async def dm(self, words: str, function: Callable[..., T], *args: Any, **named: Any) -> T:
        """Run the function on the worker of all mappings."""
        return await self._timed(self.dm_worker, words, function, *args, **named)

    def require_medium(self) -> None:
        """Raise MediumGoneError if the medium has gone: the error table comes first. Any thread."""
        if self.stop.medium_gone:
            raise MediumGoneError(self.stop.words)

    async def each(self, *operations: Operation) -> list[Any]:
        """Run the operations in order on the volume's own worker, up to the first that fails.

        They are handed over to the worker once, and return the list of their results.
        """
        await self.cut_off.until_live()
        return await self._in_one_call(self.worker, operations)

    async def dm_each(self, *operations: Operation) -> list[Any]:
        """As `each`, on the worker of all mappings."""
        return await self._in_one_call(self.dm_worker, operations)

    async def _in_one_call(self, worker: Worker, operations: Sequence[Operation]) -> list[Any]:
        sequence = _Sequence(operations, asyncio.get_running_loop().time, worker.observe)
        words = f"{operations[0][0]} and more"
        try:
            late = self._late(lambda: sequence.words)
            return await worker.run(words, sequence, late=late, since=lambda: sequence.since)
        finally:
            for each, took in sequence.took:
                self.took[each] = self.took.get(each, 0.0) + took

    async def _timed(
        self, worker: Worker, words: str, function: Callable[..., T], *args: Any, **named: Any
    ) -> T:
        clock = asyncio.get_running_loop().time
        begun = clock()
        try:
            late = self._late(lambda: words)
            return await worker.run(words, function, *args, late=late, **named)
        finally:
            self.took[words] = self.took.get(words, 0.0) + clock() - begun

    def _late(self, words: Callable[[], str]) -> Late:
        return lambda why: self.late(None if why is None else f"{words()}: {why}")


class _Sequence:
    """Operations that run one after the other in one call; the loop can see which one runs.

    Called again after an operation that did not end, as a worker in tests may, it goes on with it.
    """

    def __init__(
        self, operations: Sequence[Operation], clock: Callable[[], float], observe: Observe
    ) -> None:
        self._operations = operations
        self._clock = clock
        self._observe = observe
        self._begun = self.since = clock()
        self._results: list[Any] = []
        self.took: list[tuple[str, float]] = []
        """Duration of each operation in seconds, the first with its wait for a turn."""

    @property
    def words(self) -> str:
        """The operation that runs now. Any thread."""
        return self._operations[min(len(self._results), len(self._operations) - 1)][0]

    def __call__(self) -> list[Any]:
        for words, function in self._operations[len(self._results) :]:
            self.since = self._clock()
            try:
                with self._observe(words):
                    self._results.append(function())
            finally:
                ended = self._clock()
                self.took.append((words, ended - self._begun))
                self._begun = ended
        return self._results
