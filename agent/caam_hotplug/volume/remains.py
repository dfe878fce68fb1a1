"""What is left of a released volume because others hold it, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from caam_hotplug.errors import HotplugError, ReleaseError, WritesLostError
from caam_hotplug.model import Mapping, State
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.release import who_uses
from caam_hotplug.volume.stop_signal import LOSES_DATA, Reason

LOST: Final = "it was mounted read-write; what was written last may be lost"


@dataclass(frozen=True, slots=True)
class Remains:
    """What the kernel still has, or may have."""

    mapping: Mapping | None
    """None if that is not known."""
    words: str


async def remains(operations: Operations, uuid: str) -> Remains | None:
    """Return what is left of the mapping, and in words who holds it; None if it has gone."""
    try:
        left = await operations.dm("look for the mapping", operations.kernel.find_mapping, uuid)
        if left is None:
            return None
        others = "; ".join(await who_uses(operations, left, is_released=True)) or "others"
    except (HotplugError, OSError) as error:
        return Remains(None, str(error))
    return Remains(left, f"mapping {left.name} is held open: {others}; it goes when they close it")


def in_words(error: ReleaseError) -> str:
    """Return the failure of a release, and the one before it, for which it was released."""
    before = error.__cause__ and error.__cause__.__context__
    cause = f"; before that: {before}" if isinstance(before, HotplugError) else ""
    return f"{error}{cause}"


def note_last_writes(record: Record) -> None:
    """Publish that data may be lost, and remember it if the medium that lacks them is there."""
    if record.stop.reason is not Reason.OTHER_TABLE:  # then it was not removed
        record.status.publish(State.REMOVED_UNSAFELY, LOST)
    if record.stop.reason in LOSES_DATA:
        record.note_lost(WritesLostError(LOST))
