"""What was written to a volume and could not be: known from before its mount to its release."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from caam_hotplug.errors import WritesLostError
from caam_hotplug.kernel.api import WriteWatch
from caam_hotplug.model import Mapping
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.worker import to_the_end


class Writes:
    """The watch for failed writes of one mapping, while it is served. Loop only."""

    def __init__(self) -> None:
        self.watch: WriteWatch | None = None
        """None before the mapping is made, and once all is written and the watch closed."""
        self.was_writable = False
        """Whether the filesystem was writable when it was released."""
        self.lost = ""
        """What could not be written; empty while that is nothing."""

    @property
    def holds(self) -> int:
        """How many times the watch holds the mapping open."""
        return 0 if self.watch is None else 1

    @property
    def has_errors(self) -> bool:
        """Whether the filesystem has counted errors since it was mounted, as last seen."""
        return self.watch is not None and self.watch.has_errors

    @property
    def error(self) -> WritesLostError | None:
        """The error to raise for what could not be written, if there is any."""
        return WritesLostError(self.lost) if self.lost else None

    def lose(self, what: str) -> None:
        """Note what could not be written, as if the watch had seen it."""
        if self.watch is not None:
            self.watch.note(what)
            self.note()

    def note(self) -> None:
        """Remember what the watch has seen."""
        if self.watch is not None:
            self.lost = self.lost or self.watch.lost

    def close(self) -> None:
        """Close the watch: at a departure not before the error table, for which it would wait."""
        watch, self.watch = self.watch, None
        if watch is not None:
            self.lost = self.lost or watch.lost
            watch.close()


@asynccontextmanager
async def watched(operations: Operations, mapping: Mapping, writes: Writes) -> AsyncIterator[None]:
    """Watch a mapping that others write to, which the agent does not mount."""
    writes.watch = await operations.call(
        "watch its writes", operations.kernel.watch_writes, mapping
    )
    try:
        yield
        known = writes.lost
        if not operations.stop.medium_gone and writes.watch is not None:
            await operations.call("flush", writes.watch.check)
    finally:
        await to_the_end(operations.call, "end the watch", writes.close)
    if writes.lost != known:
        raise WritesLostError(writes.lost)
