"""What people ask of a volume while it is there, and what they are told of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from caam_hotplug.errors import HotplugError, shown


class Ask(Enum):
    """What can be asked of a volume."""

    LOCK = "lock"
    EJECT = "eject"
    UNLOCK = "unlock"
    RETRY = "retry"


@dataclass(eq=False)
class Request:
    """One request: answered once, by the volume's life. Synchronization: loop only."""

    ask: Ask
    by: str
    """Who asked, for the journal."""
    answer: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def words(self) -> str:
        """What is asked for, and by whom."""
        return f"{self.ask.value} asked for by {shown(self.by)}"

    @property
    def releases(self) -> bool:
        """Whether the volume is to be let go."""
        return self.ask in {Ask.LOCK, Ask.EJECT}

    def grant(self) -> None:
        """It has been done."""
        if not self.answer.done():
            self.answer.set_result(None)

    def refuse(self, error: HotplugError) -> None:
        """It has not been done, for this reason."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # whoever asked may have gone away
