"""Decides that a medium is safe to remove: all volumes on it are released."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from caam_hotplug.model import State
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.requests import Ask, Request

_RELEASED: Final = {State.IGNORED, State.LOCKED, State.EJECTED}
"""States of a volume that holds nothing, unless a leftover is there."""


async def release_medium(record: Record, siblings: Callable[[], list[Record]], by: str) -> None:
    """Release a volume and its siblings on the medium, and publish all as safe to remove.

    Raises: RequestRefusedError if a volume is in use. Those released before stay released, and
    none is published as safe to remove.
    """
    if record.why_not(Ask.EJECT) is None:
        for sibling in siblings():
            if sibling.phase.has_leftover or sibling.status.state not in _RELEASED:
                await sibling.ask(Request(Ask.LOCK, by))
    await record.ask(Request(Ask.EJECT, by))
    for sibling in siblings():
        sibling.repark(State.EJECTED, "safe to remove")


def revoke(siblings: Iterable[Record]) -> None:
    """Publish the siblings of a volume that is to be unlocked as locked, not as safe to remove."""
    for sibling in siblings:
        if sibling.status.state is State.EJECTED:
            sibling.repark(State.LOCKED, "another volume of its medium was unlocked")
