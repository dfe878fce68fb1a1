"""What is left of a released volume because others hold it, and what it lacks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import HotplugError, ReleaseError, WritesLostError
from caam_hotplug.model import Mapping, State
from caam_hotplug.volume.holding import Interference, UnfinishedRelease
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.phases import Cause, Failure
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.release import who_uses
from caam_hotplug.volume.status import with_loss
from caam_hotplug.volume.stop_signal import IS_THERE, LOSES_DATA

LOST: Final = "it was mounted read-write; what was written last may be lost"


@dataclass(frozen=True, slots=True)
class Remains:
    """What the kernel still has, or may have."""

    state: State
    words: str
    is_known: bool = True
    """Whether the kernel has it, so that it will report when that goes."""


async def remains(record: Record, operations: Operations, cause: Cause) -> Remains | None:
    """Return what is left of a volume that was released for this cause; None if that is nothing.

    A mapping that is left is watched from then on. After an unmount by somebody else nobody may use
    it: the kernel reports that before it has written the filesystem and closed the mapping.
    """
    state = cause.state if isinstance(cause, Failure) else State.FAILED
    before = (
        f"{cause.words}; " if isinstance(cause, Interference | UnfinishedRelease | Failure) else ""
    )
    try:
        left = await _watched(record, operations)
    except (HotplugError, OSError) as error:
        return Remains(State.FAILED, f"{before}{error}", is_known=False)
    if left is None:
        record.holding.end()
        return None
    if not left.is_removed_at_last_close:  # the attempt has not come to that, or an earlier run
        return Remains(state, with_loss(with_cure(cause.words, left), record.lost))
    who = await _who_holds(record, operations, left)
    if isinstance(cause, Interference) and not who:  # it is closing
        state = State.DETACHING
    others = "; ".join(who) or "others"
    words = f"{before}mapping {left.name} is held open: {others}; it goes when they close it"
    return Remains(state, with_loss(words, record.lost))


async def _who_holds(record: Record, operations: Operations, left: Mapping) -> tuple[str, ...]:
    """Return who has it open: as before if as many have, since a search is dear."""
    holding = record.holding
    seen, who = holding.users or (None, ())
    if seen == left and who:
        return who
    try:
        who = await who_uses(operations, left, is_released=True, also=holding.number)
    except (HotplugError, OSError) as error:
        return (f"by whom is not known: {error}",)
    holding.users = (left, who)
    return who


async def with_leftover(record: Record, operations: Operations, words: str) -> str:
    """Return the words, and the mapping that is left, if the kernel has one and says so.

    Its removal is noticed from then on.
    """
    try:
        left = await _watched(record, operations)
    except (HotplugError, OSError):
        return words
    return words if left is None else with_cure(words, left)


def with_cure(words: str, left: Mapping) -> str:
    """Return the words, and what ends a mapping whose removal nobody has asked for."""
    cure = "`lock` releases it"
    return words if cure in words else f"{words}; mapping {left.name} is left, and {cure}"


async def _watched(record: Record, operations: Operations) -> Mapping | None:
    """Return the mapping that is left, whose removal is noticed since before it was looked for."""
    record.holding.is_mapping_doubted = record.holding.is_look_wanted = False
    look, uuid = operations.kernel.find_mapping, names.dm_uuid(record.volume.id)
    left = await operations.dm("look for the mapping", look, uuid)
    if left is not None and record.holding.watch(left):
        left = await operations.dm("look for the mapping", look, uuid)
    return left


def in_words(error: ReleaseError) -> str:
    """Return the failure of a release, and the one before it, for which it was released."""
    before = error.__cause__ and error.__cause__.__context__
    cause = f"; before that: {before}" if isinstance(before, HotplugError) else ""
    return f"{error}{cause}"


def note_last_writes(record: Record) -> None:
    """Publish that data may be lost, and remember it if the medium that lacks them is there."""
    if record.stop.reason not in IS_THERE:  # then it was not removed
        record.status.publish(State.REMOVED_UNSAFELY, LOST)
    if record.stop.reason in LOSES_DATA:
        record.note_lost(WritesLostError(LOST))
