"""One lifecycle for every volume; events start and end them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from typing import Any, assert_never

from caam_hotplug import names
from caam_hotplug.config.rules import Plan, Rule, match_rules
from caam_hotplug.daemon import safe_removal
from caam_hotplug.errors import HotplugError, RequestRefusedError
from caam_hotplug.model import (
    Announced,
    Appeared,
    Disappeared,
    Event,
    EventsLost,
    Mapping,
    State,
    Volume,
    VolumeId,
)
from caam_hotplug.systemd import journal
from caam_hotplug.volume.leftovers import release_orphan
from caam_hotplug.volume.lifecycle import VolumeLifecycle
from caam_hotplug.volume.phases import Evaluate, Parked
from caam_hotplug.volume.record import Context, Record
from caam_hotplug.volume.requests import Ask, Request

log = logging.getLogger(__name__)


class Supervisor:
    """Starts and ends lifecycles. Synchronization: loop only."""

    def __init__(self, context: Context, leftovers: Iterable[Mapping]) -> None:
        """`leftovers`: mappings of an earlier run of the agent, to adopt or to release."""
        self._context = context
        self._leftovers = list(leftovers)
        self._with_leftovers: set[VolumeId] = set()
        """Volumes that are present, whose leftover mapping no lifecycle has taken over yet."""
        self._group = asyncio.TaskGroup()
        self._lifecycles: dict[VolumeId, VolumeLifecycle] = {}
        self._at: dict[str, VolumeId] = {}
        """Present volumes by the kernel's name of their device."""
        self._next: dict[VolumeId, Volume] = {}
        """Volumes that came back before their lifecycle has ended."""
        self._parked: dict[VolumeId, Parked] = {}
        """Volumes released on request while the kernel re-reads the partition table."""
        self._stopping = False
        self._tasks: dict[asyncio.Task[None], Callable[[], str]] = {}

    async def __aenter__(self) -> Supervisor:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        await self._group.__aexit__(*error)  # type: ignore[arg-type]

    def start(self, present: Iterable[Appeared], there: Iterable[Volume]) -> None:
        """Start the lifecycles of all present volumes, and release leftovers without a volume.

        `there`: the volumes that the kernel has, without the facts that only udev knows. Volumes
        with leftovers start without udev's report.

        They start first, since nobody else can be given what they hold already. So do leftovers
        without a volume: they keep their mount points reserved until they are released.
        """
        reported = {event.volume.id: event.volume for event in present}
        known = ({volume.id: volume for volume in there} if self._leftovers else {}) | reported
        for mapping in self._leftovers:
            owner = names.volume_of_dm_uuid(mapping.uuid)
            if owner is not None and owner in known:
                self._with_leftovers.add(owner)
            else:
                self._run(self._release_orphan(mapping), partial(str, f"mapping {mapping.name}"))
        disks = [VolumeId(owner.diskseq, 0) for owner in self._with_leftovers]
        for which in dict.fromkeys([*self._with_leftovers, *disks, *reported]):
            if which in known:
                self._arrive(known[which])

    def take(self, event: Event, present: Iterable[Appeared]) -> None:
        """Act on an event; `present` is compared with the lifecycles if events were lost."""
        match event:
            case Appeared(volume):
                self._arrive(volume)
            case Announced(volume):
                self._arrive_early(volume)
            case Disappeared(name):
                self._depart(name)
            case EventsLost():
                self._reconcile(list(present))
            case _:
                assert_never(event)

    def stop(self) -> None:
        """Ask every lifecycle to end; leaving the context does that too, and waits for them."""
        self._stopping = True
        self._next.clear()
        for lifecycle in self._lifecycles.values():
            lifecycle.record.agent_stops()

    def reevaluate(self, rules: tuple[Rule, ...]) -> None:
        """Put these rules in force, also for present volumes."""
        self._context.rules = rules
        for lifecycle in self._lifecycles.values():
            lifecycle.record.rules_changed()

    def machine_woke(self) -> None:
        """Have every mapping compared with what it gave before the sleep."""
        for lifecycle in self._lifecycles.values():
            lifecycle.record.machine_woke()

    def blob_appeared(self, name: str | None) -> None:
        """Report a new blob to all volumes; with None, any blob may be there."""
        for lifecycle in self._lifecycles.values():
            lifecycle.record.blob_appeared(name)

    async def lock(self, which: VolumeId, by: str) -> None:
        """Unmount the volume and remove its mapping. Raises: RequestRefusedError."""
        await self._ask(which, Ask.LOCK, by)

    async def unlock(self, which: VolumeId, by: str) -> None:
        """Mount the volume, or do what else its rule asks for. Raises: RequestRefusedError."""
        safe_removal.revoke(self._siblings(which))
        await self._ask(which, Ask.UNLOCK, by)

    async def retry(self, which: VolumeId, by: str) -> None:
        """As `unlock`, for a volume that failed or waits. Raises: RequestRefusedError."""
        await self._ask(which, Ask.RETRY, by)

    async def eject(self, which: VolumeId, by: str, *, power_off: bool = True) -> str:
        """Release all volumes of the medium, and return words that say that it may be pulled.

        With `power_off`, stop the medium and switch its port off, where the hardware can.
        Raises: RequestRefusedError if a volume is in use. Those released before stay released, and
        none is published as safe to remove.
        """
        lifecycle = self._lifecycle(which)
        await safe_removal.release_medium(lifecycle.record, lambda: self._siblings(which), by)
        volume = lifecycle.record.volume
        if power_off:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._run(self._power_off(lifecycle, ended), lambda: f"{volume}: power off")
            try:
                await ended
            except HotplugError as error:
                raise RequestRefusedError(f"{volume} is ejected; {error}") from error
        return f"{volume.partlabel or volume.name}: safe to remove"

    def _siblings(self, which: VolumeId) -> list[Record]:
        """Return the records of the other volumes on the medium."""
        lifecycles = self._lifecycles.items()
        return [each.record for v, each in lifecycles if v.diskseq == which.diskseq and v != which]

    async def _power_off(self, lifecycle: VolumeLifecycle, ended: asyncio.Future[None]) -> None:
        """Stop the medium, and answer the client if it still waits."""
        error: Exception | None = None
        try:
            await lifecycle.power_off()
        except Exception as refusal:  # noqa: BLE001  a defect too concerns the client, and no volume
            error = refusal
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    async def _ask(self, which: VolumeId, ask: Ask, by: str) -> None:
        await self._lifecycle(which).record.ask(Request(ask, by))

    def _lifecycle(self, which: VolumeId) -> VolumeLifecycle:
        lifecycle = self._lifecycles.get(which)
        if lifecycle is None:
            raise RequestRefusedError(f"volume {which} is not there any more")
        return lifecycle

    async def ended(self, within_s: float) -> list[str]:
        """Wait until everything is released, at most so long; return names of what is not."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within_s)
        return [name() for task, name in self._tasks.items() if not task.done()]

    def _run(self, work: Coroutine[Any, Any, None], name: Callable[[], str]) -> None:
        task = self._group.create_task(work)
        self._tasks[task] = name
        task.add_done_callback(self._tasks.pop)

    def _arrive(self, volume: Volume) -> None:
        if self._at.get(volume.name, volume.id) != volume.id:
            self._depart(volume.name)
        if self._stopping:
            return
        self._at[volume.name] = volume.id
        lifecycle = self._lifecycles.get(volume.id)
        if lifecycle is None:
            self._start(volume)
        elif lifecycle.record.stop.is_set:
            # The same insertion again (the partition table was re-read): after its old lifecycle.
            self._next[volume.id] = volume
        else:
            lifecycle.record.update(volume)

    def _arrive_early(self, volume: Volume) -> None:
        """Start without udev's report, if the volume's rule does not need it."""
        is_new = volume.id not in self._lifecycles
        if is_new and isinstance(match_rules(self._context.rules, volume), Plan):
            self._arrive(volume)

    def _depart(self, name: str) -> None:
        which = self._at.pop(name, None)
        if which is None:  # udev has not reported the disk, whose partitions may be served already
            for partition in [n for n in self._at if names.is_partition_of(n, name)]:
                self._depart(partition)
            return
        self._next.pop(which, None)
        if which in self._lifecycles:
            self._lifecycles[which].record.medium_gone()
        if which.partition == 0:
            self._parked = {v: p for v, p in self._parked.items() if v.diskseq != which.diskseq}
            # The kernel keeps the partitions of a reader's last medium, and reports nothing of
            # them, while one is in use (bdev_disk_changed in block/partitions/core.c).
            for other in [n for n, at in self._at.items() if at.diskseq == which.diskseq]:
                self._depart(other)

    def _reconcile(self, present: list[Appeared]) -> None:
        lost = journal.event(journal.Event.EVENTS_LOST)
        log.warning("the kernel dropped events; looking at all devices", extra=lost)
        for name in set(self._at) - {event.volume.name for event in present}:
            which = self._at.get(name)
            if which is None:  # it departed with its disk
                continue
            lifecycle = self._lifecycles.get(which)
            # udev does not list a device whose event it has not finished; sysfs has it.
            kernel = self._context.kernel
            if lifecycle is None or not kernel.is_present(lifecycle.record.volume):
                self._depart(name)
        for event in present:
            self._arrive(event.volume)

    def _start(self, volume: Volume) -> None:
        has_leftover = volume.id in self._with_leftovers
        self._with_leftovers.discard(volume.id)
        parked = self._parked.pop(volume.id, None) or self._parked_before(volume)
        phase = replace(parked or Evaluate(), has_leftover=has_leftover)
        lifecycle = VolumeLifecycle(self._context, volume, phase)
        self._lifecycles[volume.id] = lifecycle
        self._run(self._run_lifecycle(lifecycle, volume.id), lambda: str(lifecycle.record.volume))

    def _parked_before(self, volume: Volume) -> Parked | None:
        """Return how an earlier run of the agent has released it on request, if it has."""
        try:
            state = State(self._context.kernel.remembered(volume))
        except ValueError:
            return None
        words = "safe to remove" if state is State.EJECTED else "before the agent was started"
        is_parked = state in {State.EJECTED, State.LOCKED}
        return Parked(state=state, reason=words) if is_parked else None

    async def _run_lifecycle(self, lifecycle: VolumeLifecycle, which: VolumeId) -> None:
        record = lifecycle.record
        try:
            await lifecycle.run()
        except Exception:  # a defect of the agent must not cost the other volumes their mounts
            defect = journal.event(journal.Event.DEFECT, volume=record.volume)
            words = "%s: a defect of the agent ended its service"
            log.exception(words, record.volume, extra=defect)
            record.publish_defect(State.FAILED)
            await record.stop.until(lambda: False)
            if record.stop.medium_gone:
                record.publish_defect(State.REMOVED_UNSAFELY)
        finally:
            del self._lifecycles[which]
            lost = record.volume if record.stop.lost_in_sleep else None
            has_disk = VolumeId(which.diskseq, 0) in self._at.values()
            if record.parked is not None and (has_disk or lost is not None):
                self._parked[which] = record.parked
        again = self._next.pop(which, lost)
        if again is not None and not self._stopping:
            self._start(again)

    async def _release_orphan(self, orphan: Mapping) -> None:
        context = self._context
        worker, points = context.new_worker(f"leftover {orphan.name}"), context.mount_points
        try:
            await release_orphan(context.kernel, worker, context.dm_worker, points, orphan)
        except Exception:  # a defect of the agent must not cost present volumes their mounts
            defect = journal.event(journal.Event.DEFECT, mapping=orphan.name)
            words = "release leftover %s: a defect of the agent ended it"
            log.exception(words, orphan.name, extra=defect)
