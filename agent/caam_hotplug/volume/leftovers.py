"""Release of what an earlier run of the agent has left: mappings, mounts, keys, directories."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from functools import partial

from caam_hotplug import names
from caam_hotplug.config.rules import (
    NoMatch,
    OnBusy,
    Plan,
    Rule,
    match_rules,
    may_match,
    mount_globs,
)
from caam_hotplug.errors import (
    HotplugError,
    ReleaseError,
    VolumeBusyError,
    WritesLostError,
    shown,
)
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import Mapping, State
from caam_hotplug.volume.adoption import leading_to
from caam_hotplug.volume.cut_off import CutOff
from caam_hotplug.volume.holding import UnfinishedRelease
from caam_hotplug.volume.left_directories import remove_left
from caam_hotplug.volume.mapping import release_key, release_mapping
from caam_hotplug.volume.mount import release_mount
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.mount_table import mounts_of, places_of
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.record import Context, Record
from caam_hotplug.volume.release import SIGNAL_GRACE_S, suspended, who_uses
from caam_hotplug.volume.remains import LOST, note_last_writes
from caam_hotplug.volume.stop_signal import Reason, StopSignal
from caam_hotplug.volume.worker import Late, Worker, to_the_end

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Left:
    """What was left of a volume, and is released."""

    is_written: bool = False
    """Whether it was mounted read-write."""
    led_elsewhere: bool = False
    """Whether its mapping did not reach its medium, and had to be cut off first."""


async def release_leftovers(
    operations: Operations, uuid: str, reaches_medium: Callable[[Mapping], bool]
) -> Left:
    """Release mounts, mapping and key of this DM-UUID, as a lifecycle does at its end.

    A mapping by which a write does not reach its medium gets an error table first, so nothing is
    flushed through it. Raises: DmError if it gets none; then nothing has changed.
    """
    operations.cut_off.is_mapped = True
    async with AsyncExitStack() as then:  # each release runs whether or not one before it failed
        if (volume := names.volume_of_dm_uuid(uuid)) is not None:
            then.push_async_callback(release_key, operations, volume)
        await operations.cut_off.done()
        mapping = await operations.dm("look for the mapping", operations.kernel.find_mapping, uuid)
        if mapping is None:
            return Left()
        mounts = mounts_of(operations.kernel, mapping)
        is_written = any(not mount.read_only for mount in mounts.values())
        led_elsewhere = not (operations.stop.medium_gone or reaches_medium(mapping))
        if led_elsewhere:
            operations = await _cut_off(operations, mapping)
        elif mapping.is_suspended and not operations.stop.medium_gone:
            resume = operations.kernel.resume_mapping
            await operations.dm("resume the mapping", resume, mapping.name)
        then.push_async_callback(release_mapping, operations, uuid)
        for place in places_of(operations.kernel, mapping):
            then.push_async_callback(release_mount, operations, place, mapping)
        return Left(is_written=is_written, led_elsewhere=led_elsewhere)


async def _cut_off(operations: Operations, mapping: Mapping) -> Operations:
    """Load the error table, and return the operations for a mapping that reaches no medium."""
    said = fields("leftover-released", MAPPING=mapping.name)
    words = "mapping %s leads elsewhere, so nothing more is written through it: %s"
    log.warning(words, mapping.name, "; ".join(mapping.table), extra=said)
    without = _without_medium(
        operations.kernel, operations.worker, operations.dm_worker, mapping.uuid, operations.late
    )
    without.cut_off.is_mapped = True
    await without.cut_off.require()
    return without


class Leftover:
    """What the kernel may have of one volume, and its lifecycle does not hold.

    Synchronization: loop only.
    """

    def __init__(self, record: Record, operations: Operations) -> None:
        self._record = record
        self._operations = operations
        self._uuid = names.dm_uuid(record.volume.id)

    def require_refused(self, why: NoMatch) -> None:
        """Require that no rule matches, whatever the facts are that nobody has reported.

        Raises: HotplugError.
        """
        record = self._record
        unreported = record.facts.unreported(record.volume)
        if may_match(record.context.rules, record.volume, unreported):
            raise HotplugError(
                f"its mapping is left alone, or `lock` releases it: whether a rule matches is not "
                f"known without its {', '.join(sorted(unreported))}: {why}"
            )

    async def require_releasable(self) -> None:
        """Require that it can be released on request, and nobody uses it.

        Raises: RequestRefusedError if a flush would wait without end; VolumeBusyError if the rule
        leaves it to its users.
        """
        operations, kernel = self._operations, self._operations.kernel
        rule = self._rule()
        on_busy = OnBusy.REFUSE if rule is None else rule.on_busy
        mapping = await operations.dm("look for the mapping", kernel.find_mapping, self._uuid)
        if mapping is None:
            return
        if mapping.is_suspended and self._reaches_medium(mapping):
            raise suspended(mapping)
        if on_busy is OnBusy.DETACH:
            return
        signals = (signal.SIGTERM, signal.SIGKILL) if on_busy is OnBusy.SIGNAL else ()
        for number in (None, *signals):
            if number is not None:
                ending = (kernel.end_holders, mapping, number, SIGNAL_GRACE_S)
                await operations.call("end its users", *ending)
            users = await who_uses(operations, mapping)
            if not users:
                return
        raise VolumeBusyError(mapping.node, users)

    async def go_on(self, cause: UnfinishedRelease) -> bool:
        """Go on with a release that has not ended; False if a mount shows that it is served.

        Raises: ReleaseError.
        """
        try:
            if await self._was_served_since(cause):
                return False
        except (HotplugError, OSError) as error:
            raise ReleaseError(str(error)) from error
        await self.release(cause.words)
        return True

    async def _was_served_since(self, cause: UnfinishedRelease) -> bool:
        kernel, holding = self._operations.kernel, self._record.holding
        look = kernel.find_mapping
        mapping = await self._operations.dm("look for the mapping", look, self._uuid)
        if mapping is None:
            return False
        if cause.is_ended_by_mount and mounts_of(kernel, mapping):
            return True
        holding.watch(mapping)
        holding.was_writable = not self._record.volume.read_only  # by others, as far as is known
        return False

    async def release(self, why: str = "an earlier run of the agent has left it") -> None:
        """Release it, and note what may be lost. Raises: ReleaseError."""
        record = self._record
        record.phase = replace(record.phase, has_leftover=False)
        if record.status.state is None:
            record.status.publish(State.DETACHING, why)
        try:
            work = (release_leftovers, self._operations, self._uuid, self._reaches_medium)
            left = await to_the_end(*work)
        except ReleaseError as error:
            record.note_lost(error.__cause__)
            raise
        is_written = left.is_written or record.holding.is_left_writable
        if is_written and record.stop.medium_gone:
            note_last_writes(record)
        elif left.is_written and left.led_elsewhere:
            record.note_lost(WritesLostError(f"its mapping led elsewhere; {LOST}"))
        await self.remove_mount_points()

    async def remove_mount_points(self) -> None:
        """Remove those of the agent that nobody uses: others may have unmounted it."""
        look, plan = self._operations.kernel.our_mount_points, self._plan()
        own = [plan.mount_path] if plan is not None and plan.mount_path else []
        points = self._record.context.mount_points
        await remove_left(self._operations, points, lambda: dict.fromkeys((*own, *look())))

    def _reaches_medium(self, mapping: Mapping) -> bool:
        return leading_to(mapping, self._record.volume, self._rule()) is not None

    def _plan(self) -> Plan | None:
        plan = match_rules(self._record.context.rules, self._record.volume)
        return plan if isinstance(plan, Plan) else None

    def _rule(self) -> Rule | None:
        plan = self._plan()
        return None if plan is None else plan.rule


async def find_leftovers(kernel: Kernel, worker: Worker, dm_worker: Worker) -> list[Mapping]:
    """Remove our directories in the mount root that nothing is mounted on; return our mappings.

    The caller adopts or releases the mappings. One whose DM-UUID has a form that this version does
    not know, such as a later version's, is left alone.
    Raises: DmError if they cannot be listed: without them it is not known what is ours.
    """
    operations = _without_medium(kernel, worker, dm_worker, "")
    mappings = await operations.dm("list our mappings", kernel.our_mappings)
    await remove_left(operations, MountPoints(), kernel.our_mount_points)
    return [mapping for mapping in mappings if _is_known(mapping)]


async def remove_left_paths(context: Context) -> None:
    """Remove our directories at paths of rules that nothing is mounted on.

    A filesystem above one may hang, so this runs beside all that is served.
    """
    worker, globs = context.new_worker("directories"), mount_globs(context.rules)
    operations = _without_medium(context.kernel, worker, context.dm_worker, "")
    look = partial(context.kernel.our_paths, globs)
    await remove_left(operations, context.mount_points, look)


def _is_known(mapping: Mapping) -> bool:
    is_known = names.volume_of_dm_uuid(mapping.uuid) is not None
    if not is_known:
        words = "mapping %s is of no version that this one knows, so it is left alone: DM-UUID %s"
        log.warning(words, shown(mapping.name), shown(mapping.uuid))
    return is_known


async def release_orphan(
    kernel: Kernel, worker: Worker, dm_worker: Worker, mount_points: MountPoints, orphan: Mapping
) -> None:
    """Release a mapping without a volume. Its mount points stay reserved until then.

    Its medium may hang, so this runs beside the lifecycles of the volumes, not before them.
    Raises: HotplugError, OSError, once the error table is loaded.
    """
    volume = names.volume_of_dm_uuid(orphan.uuid)
    operations = _without_medium(kernel, worker, dm_worker, orphan.uuid)
    operations.cut_off.is_mapped = True
    begun = asyncio.ensure_future(operations.cut_off.done())  # whether or not mounts can be seen
    try:
        with ExitStack() as reserved:
            if volume is not None:
                for place in places_of(kernel, orphan):
                    reserved.enter_context(mount_points.reserved(place, volume, lambda: None))
            await release_leftovers(operations, orphan.uuid, lambda _: False)
    finally:
        await begun


def _log_late(why: str | None) -> None:
    if why is not None:
        log.warning("release leftovers: %s", why)


def _without_medium(
    kernel: Kernel, worker: Worker, dm_worker: Worker, uuid: str, late: Late = _log_late
) -> Operations:
    stop = StopSignal()
    stop.set(Reason.GONE)
    cut_off = CutOff(kernel, stop, lambda: worker, late, uuid)
    return Operations(kernel, stop, worker, dm_worker, late, cut_off)
