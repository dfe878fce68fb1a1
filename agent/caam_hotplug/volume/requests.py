"""Requests of users for one volume: lock, eject, unlock, retry."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import Enum

from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.model import State


class Ask(Enum):
    """What a user can ask of a volume."""

    LOCK = "lock"
    EJECT = "eject"
    UNLOCK = "unlock"
    RETRY = "retry"


@dataclass(eq=False)
class Request:
    """One request, answered once by the volume's lifecycle. Synchronization: loop only."""

    ask: Ask
    by: str
    """Who asked, for the journal."""
    mounts: bool = True
    """Whether what it unlocks is mounted, if its rule says so."""
    answer: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )

    @property
    def words(self) -> str:
        """The request and who made it, in words."""
        how = "" if self.mounts else " without a mount"
        return f"{self.ask.value}{how} asked for by {shown(self.by)}"

    @property
    def releases(self) -> bool:
        """Whether the volume is to be released."""
        return self.ask in {Ask.LOCK, Ask.EJECT}

    def grant(self) -> None:
        """Answer that it is done."""
        if not self.answer.done():
            self.answer.set_result(None)

    def refuse(self, error: HotplugError) -> None:
        """Answer that it is not done, and why."""
        if not self.answer.done():
            self.answer.set_exception(error)
            self.answer.exception()  # the client may have gone; asyncio would report it as lost


def refusal(ask: Ask, state: State | None) -> str | None:
    """Return why this cannot be asked of a volume in that state, or None if it can."""
    match state, ask:
        case State.IGNORED, _:
            return "no rule matches it, so the agent leaves it alone; `explain` says why"
        case (State.MOUNTED | State.UNLOCKED) as state, Ask.UNLOCK:
            return f"it is {state.value} already"
        case (State.LOCKED | State.EJECTED) as state, Ask.RETRY:
            return f"it is {state.value}, since that was asked for; unlock it"
    return None
