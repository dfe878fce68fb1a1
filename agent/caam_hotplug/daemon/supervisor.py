"""One lifecycle for every volume; events start and end them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Set
from typing import Any, assert_never

from caam_hotplug import names
from caam_hotplug.config.rules import Plan, Rule, match_rules
from caam_hotplug.daemon.changed_disks import ChangedDisks
from caam_hotplug.daemon.defects import end_of_service, guarded
from caam_hotplug.daemon.observer import Observer
from caam_hotplug.daemon.orphans import Orphans
from caam_hotplug.daemon.safe_removal import SAFE, SafeRemoval
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.formats.marks import Mark
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
from caam_hotplug.volume.lifecycle import VolumeLifecycle
from caam_hotplug.volume.phases import Parked, first_phase
from caam_hotplug.volume.record import Context, Record
from caam_hotplug.volume.requests import Ask, Request
from caam_hotplug.volume.worker import all_ended

Reported = Appeared | Disappeared


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
        self._changed = ChangedDisks(context, self.run)
        self._orphans = Orphans(context, self._changed, self.run)
        self._removal = SafeRemoval(context, self)
        self.observer = Observer(context.kernel, self._records)
        self._stopping = False
        self._tasks: dict[asyncio.Task[None], Callable[[], str]] = {}

    async def __aenter__(self) -> Supervisor:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stop()
        await self._group.__aexit__(*error)  # type: ignore[arg-type]

    def start(self, present: Iterable[Reported], there: Iterable[Volume]) -> None:
        """Start the lifecycles of all present volumes, and release leftovers without a volume.

        `there`: the volumes that the kernel has, without the facts that only udev knows. Volumes
        with leftovers start without udev's report.

        They start first: nobody else can be given what they hold. So do leftovers without a volume,
        which keep their mount points reserved until they are released.
        """
        reported = {e.volume.id: e.volume for e in present if isinstance(e, Appeared)}
        known = ({volume.id: volume for volume in there} if self._leftovers else {}) | reported
        for mapping in self._leftovers:
            owner = names.volume_of_dm_uuid(mapping.uuid)
            if owner is not None and owner in known:
                self._with_leftovers.add(owner)
            else:
                self._orphans.release(mapping)
        disks = [VolumeId(owner.diskseq, 0) for owner in self._with_leftovers]
        for which in dict.fromkeys([*self._with_leftovers, *disks, *reported]):
            if which in known:
                self._arrive(known[which])
        self._orphans.remove_directories()

    def take(self, event: Event, present: Iterable[Reported]) -> None:
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
        self._removal.close()
        self._orphans.close()
        self._next.clear()
        for record in self._records():
            record.agent_stops()

    def reevaluate(self, rules: tuple[Rule, ...]) -> None:
        """Put these rules in force, also for present volumes."""
        self._context.rules = rules
        for record in self._records():
            record.rules_changed()

    def machine_woke(self) -> None:
        """Have every mapping compared with what it gave before the sleep."""
        for record in self._records():
            record.machine_woke()

    def mounts_changed(self) -> None:
        """Have what is published compared with the mounts that there are now."""
        self.observer.mounts_changed()

    def blob_appeared(self, name: str | None) -> None:
        """Report a new blob to all volumes; with None, any blob may be there."""
        for record in self._records():
            record.blob_appeared(name)

    async def lock(self, which: VolumeId, by: str) -> None:
        """Unmount the volume and remove its mapping. Raises: RequestRefusedError."""
        await self._lifecycle(which).record.ask(Request(Ask.LOCK, by))

    async def unlock(self, which: VolumeId, by: str, *, mounts: bool = True) -> None:
        """Unlock the volume; with `mounts`, as its rule says. Raises: RequestRefusedError."""
        record = self._lifecycle(which).record
        if record.why_not(Ask.UNLOCK) is None:
            await self._removal.before_unlock(record, by)
        await self._lifecycle(which).record.ask(Request(Ask.UNLOCK, by, mounts))

    async def retry(self, which: VolumeId, by: str) -> None:
        """As `unlock`, for a volume that failed or waits. Raises: RequestRefusedError."""
        await self._lifecycle(which).record.ask(Request(Ask.RETRY, by))

    async def eject(self, which: VolumeId, by: str, *, power_off: bool = True) -> str:
        """Release all volumes of the medium, and return words that say that it may be pulled.

        With `power_off`, stop the medium and switch its port off, where the hardware can; without,
        others may use its disk afterwards. Raises: RequestRefusedError.
        """
        record = self._lifecycle(which).record
        await self._removal.eject(record, by, power_off=power_off)
        return f"{record.volume.partlabel or record.volume.name}: {SAFE}"

    def _records(self) -> list[Record]:
        return [lifecycle.record for lifecycle in self._lifecycles.values()]

    def _lifecycle(self, which: VolumeId) -> VolumeLifecycle:
        lifecycle = self._lifecycles.get(which)
        if lifecycle is None:
            raise RequestRefusedError(f"volume {which} is not there any more")
        return lifecycle

    async def ended(self, within_s: float) -> list[str]:
        """Wait until everything is released, at most so long; return names of what is not."""
        await all_ended(self._tasks, within_s)
        return [name() for task, name in self._tasks.items() if not task.done()]

    # As `DiskVolumes` has it.

    def records_of(self, diskseq: int) -> list[Record]:
        """Return the records of the disk's volumes."""
        return [each for each in self._records() if each.volume.id.diskseq == diskseq]

    def depart(self, diskseq: int, but: Set[VolumeId]) -> None:
        """End the lifecycles of the disk's volumes but for these."""
        for name, at in list(self._at.items()):
            if at.diskseq == diskseq and at not in but:
                self._end(name)

    def start_parked(self, volume: Volume, state: State, reason: str) -> None:
        """Start the lifecycle of a volume that was released on request, unless it has one."""
        is_disk_there = VolumeId(volume.id.diskseq, 0) in self._at.values()
        if is_disk_there and volume.id not in self._lifecycles and not self._stopping:
            self._at[volume.name] = volume.id
            self._parked[volume.id] = Parked(state=state, reason=reason)
            self._start(volume)

    def run(self, work: Coroutine[Any, Any, None], name: Callable[[], str]) -> None:
        """Run the work to its end, and name it if a stop has to wait for it."""
        task = self._group.create_task(work)
        self._tasks[task] = name
        task.add_done_callback(self._tasks.pop)

    def _arrive(self, volume: Volume) -> None:
        before = self._at.get(volume.name, volume.id)
        if before.diskseq != volume.id.diskseq:
            self._removal.departed(before.diskseq)
        if before != volume.id:
            self._depart(volume.name)
        if self._stopping:
            return
        self._removal.appeared(volume.id)
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
        self._removal.appeared(volume.id)
        is_new = volume.id not in self._lifecycles
        if is_new and isinstance(match_rules(self._context.rules, volume), Plan):
            self._arrive(volume)

    def _depart(self, name: str) -> None:
        which = self._at.get(name)
        if which is None:  # udev has not reported the disk, whose partitions may be served already
            for partition in [n for n in self._at if names.is_partition_of(n, name)]:
                self._removal.departed(self._at[partition].diskseq)
                self._end(partition)
            return
        lifecycle = self._lifecycles.get(which)
        is_parked = lifecycle is not None and lifecycle.record.parked is not None
        if is_parked and self._removal.keeps(which):
            return
        self._end(name)
        if which.partition == 0:
            self._removal.departed(which.diskseq)
            self._parked = {v: p for v, p in self._parked.items() if v.diskseq != which.diskseq}
            # The kernel keeps the partitions of a reader's last medium, and reports nothing of
            # them, while one is in use (bdev_disk_changed in block/partitions/core.c).
            self.depart(which.diskseq, but=frozenset())

    def _end(self, name: str) -> None:
        which = self._at.pop(name)
        self._next.pop(which, None)
        if which in self._lifecycles:
            self._lifecycles[which].record.medium_gone()

    def _reconcile(self, reported: list[Reported]) -> None:
        self.observer.events_lost()
        present = [event for event in reported if isinstance(event, Appeared)]
        for event in reported:
            if isinstance(event, Disappeared):
                self._depart(event.name)
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
        mark = Mark.from_text(self._context.kernel.remembered(volume))
        has_leftover = volume.id in self._with_leftovers
        self._with_leftovers.discard(volume.id)
        phase = first_phase(mark, self._parked.pop(volume.id, None), has_leftover=has_leftover)
        lifecycle = VolumeLifecycle(self._context, volume, phase, mark.lost if mark else "")
        lifecycle.record.mounts = mark is None or not mark.is_unmounted
        self._lifecycles[volume.id] = lifecycle
        self._changed.begin(volume.id)
        self.run(self._run_lifecycle(lifecycle, volume.id), lambda: str(lifecycle.record.volume))
        if volume.id.partition == 0:
            words = f"{volume}: hold it again"
            self.run(guarded(self._removal.recover(volume), words, volume=volume), lambda: words)

    async def _run_lifecycle(self, lifecycle: VolumeLifecycle, which: VolumeId) -> None:
        record = lifecycle.record
        try:
            await lifecycle.run()
        except Exception:  # noqa: BLE001  a defect must not cost the other volumes their mounts
            await end_of_service(record)
        finally:
            del self._lifecycles[which]
            lost = record.volume if record.stop.is_cut_off else None
            has_disk = VolumeId(which.diskseq, 0) in self._at.values()
            if record.parked is not None and (has_disk or lost is not None):
                self._parked[which] = record.parked
        self._changed.end(which, record.volume.number if record.stop.medium_gone else None)
        again = self._next.pop(which, lost)
        if again is not None and not self._stopping:
            self._start(again)
