"""One life for every volume; events decide which of them begin and end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, Final, assert_never

from caam_hotplug import names
from caam_hotplug.config.rules import Plan, Rule, match_rules
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
from caam_hotplug.volume.lifecycle import Context, Rest, VolumeLifecycle
from caam_hotplug.volume.requests import Ask, Request
from caam_hotplug.volume.stop_signal import Reason

log = logging.getLogger(__name__)

_LET_GO: Final = {State.IGNORED, State.LOCKED, State.EJECTED}
"""States of a volume that does not keep its medium from being pulled."""


class Supervisor:
    """Begins and ends lives. Synchronization: loop only."""

    def __init__(self, context: Context, left: Iterable[Mapping]) -> None:
        """`left`: what an earlier run of the agent has left, to adopt or to release."""
        self._context = context
        self._left = list(left)
        self._inherited: set[VolumeId] = set()
        self._group = asyncio.TaskGroup()
        self._lives: dict[VolumeId, VolumeLifecycle] = {}
        self._at: dict[str, VolumeId] = {}
        self._next: dict[VolumeId, Volume] = {}
        self._rested: dict[VolumeId, Rest] = {}
        """What was let go on request, whose partition has gone for a moment and whose disk has not:
        its partition table is read anew."""
        self._stopping = False
        self._tasks: dict[asyncio.Task[None], Callable[[], str]] = {}

    async def __aenter__(self) -> Supervisor:
        await self._group.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._group.__aexit__(*error)  # type: ignore[arg-type]

    def start(self, present: Iterable[Appeared], there: Iterable[Volume]) -> None:
        """Lives of all present volumes have begun, and what no volume that is there owns is let go.

        `there`: the volumes that the kernel has, without what only udev knows. Of those that
        inherit something udev may not have told yet; their lives begin all the same.

        Those that inherit come first: what they hold already, nobody else can be given. So do
        orphans, which own their mount points until they are released.
        """
        told = {event.volume.id: event.volume for event in present}
        known = ({volume.id: volume for volume in there} if self._left else {}) | told
        for mapping in self._left:
            owner = names.volume_of_dm_uuid(mapping.uuid)
            if owner is not None and owner in known:
                self._inherited.add(owner)
            else:
                self._run(self._release(mapping), partial(str, f"mapping {mapping.name}"))
        disks = [VolumeId(owner.diskseq, 0) for owner in self._inherited]
        for which in dict.fromkeys([*self._inherited, *disks, *told]):
            if which in known:
                self._arrive(known[which])

    def take(self, event: Event, present: Iterable[Appeared]) -> None:
        """The event has been acted on; `present` is looked through if events were lost."""
        match event:
            case Appeared(volume):
                self._arrive(volume)
            case Announced(volume):
                self._begin_early(volume)
            case Disappeared(name):
                self._depart(name)
            case EventsLost():
                self._reconcile(list(present))
            case _:
                assert_never(event)

    def stop(self) -> None:
        """Every life has been asked to end; leaving the context waits for them."""
        self._stopping = True
        self._next.clear()
        for life in self._lives.values():
            life.stop()

    def renew(self, rules: tuple[Rule, ...]) -> None:
        """These rules are in force, also for the volumes that are present."""
        self._context.rules = rules
        for life in self._lives.values():
            life.renew()

    def blob_appeared(self, name: str | None) -> None:
        """Whoever waits for the blob of this file name looks again; everyone who waits if None."""
        for life in self._lives.values():
            life.blob_appeared(name)

    async def lock(self, which: VolumeId, by: str) -> None:
        """Nothing of the volume is mounted or mapped. Raises: RequestRefusedError."""
        await self._ask(which, Ask.LOCK, by)

    async def unlock(self, which: VolumeId, by: str) -> None:
        """The volume is mounted, or whatever its rule asks for. Raises: RequestRefusedError."""
        for beside in self._beside(which):
            if beside.status.state is State.EJECTED:
                beside.rest_instead(State.LOCKED, "another volume of its medium was unlocked")
        await self._ask(which, Ask.UNLOCK, by)

    async def retry(self, which: VolumeId, by: str) -> None:
        """As unlock, for one that failed or waits. Raises: RequestRefusedError."""
        await self._ask(which, Ask.RETRY, by)

    async def eject(self, which: VolumeId, by: str, *, power_off: bool = True) -> str:
        """The volume is let go with all others on its medium, which may be pulled; in words.

        With `power_off`, the medium is stopped and its port switched off, where the hardware can.
        Raises: RequestRefusedError if one of them is in use; those let go before stay so, and none
        is said to be safe to remove.
        """
        life = self._life(which)
        if life.why_not(Ask.EJECT) is None:
            for beside in self._beside(which):
                if beside.status.state not in _LET_GO:
                    await self._ask(beside.volume.id, Ask.LOCK, by)
        await self._ask(which, Ask.EJECT, by)
        for beside in self._beside(which):
            beside.rest_instead(State.EJECTED, "safe to remove")
        if power_off:
            ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._run(self._power_off(life, ended), lambda: f"{life.volume}: power off")
            try:
                await ended
            except HotplugError as error:
                raise RequestRefusedError(f"{life.volume} is ejected; {error}") from error
        return f"{life.volume.partlabel or life.volume.name}: safe to remove"

    def _beside(self, which: VolumeId) -> list[VolumeLifecycle]:
        """The other volumes on the medium."""
        lives = self._lives.items()
        return [life for v, life in lives if v.diskseq == which.diskseq and v != which]

    async def _power_off(self, life: VolumeLifecycle, ended: asyncio.Future[None]) -> None:
        """The medium is stopped, for whoever asked for it if he still waits."""
        error: Exception | None = None
        try:
            await life.power_off()
        except Exception as refusal:  # noqa: BLE001  a defect too is for him, and for no other volume
            error = refusal
        if ended.done():
            return
        if error is None:
            ended.set_result(None)
        else:
            ended.set_exception(error)

    async def _ask(self, which: VolumeId, ask: Ask, by: str) -> None:
        await self._life(which).ask(Request(ask, by))

    def _life(self, which: VolumeId) -> VolumeLifecycle:
        life = self._lives.get(which)
        if life is None:
            raise RequestRefusedError(f"volume {which} is not there any more")
        return life

    async def ended(self, within_s: float) -> list[str]:
        """All has been let go, or so much time has passed: what has not been, by its name."""
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
        life = self._lives.get(volume.id)
        if life is None:
            self._begin(volume)
        elif life.stop_signal.asked:
            # The same insertion again (a partition table was read anew): after its old life.
            self._next[volume.id] = volume
        else:
            life.update(volume)

    def _begin_early(self, volume: Volume) -> None:
        """What udev tells is not waited for by a volume whose rule does not ask for it."""
        is_new = volume.id not in self._lives
        if is_new and isinstance(match_rules(self._context.rules, volume), Plan):
            self._arrive(volume)

    def _depart(self, name: str) -> None:
        which = self._at.pop(name, None)
        if which is None:  # udev had not told of the disk, whose partitions may be served already
            for partition in [n for n in self._at if names.is_partition_of(n, name)]:
                self._depart(partition)
            return
        self._next.pop(which, None)
        if which in self._lives:
            self._lives[which].stop_signal.ask(Reason.GONE)
        if which.partition == 0:
            self._rested = {v: r for v, r in self._rested.items() if v.diskseq != which.diskseq}
            # The kernel keeps the partitions of a reader's last medium, and says nothing of them,
            # while one is in use (bdev_disk_changed in block/partitions/core.c).
            for other in [n for n, at in self._at.items() if at.diskseq == which.diskseq]:
                self._depart(other)

    def _reconcile(self, present: list[Appeared]) -> None:
        lost = journal.event(journal.Event.EVENTS_LOST)
        log.warning("the kernel dropped events; looking at all devices", extra=lost)
        for name in set(self._at) - {event.volume.name for event in present}:
            which = self._at.get(name)
            if which is None:  # it departed with its disk
                continue
            life = self._lives.get(which)
            # udev does not list a device whose event it has not finished; sysfs knows better.
            if life is None or not self._context.kernel.is_present(life.volume):
                self._depart(name)
        for event in present:
            self._arrive(event.volume)

    def _begin(self, volume: Volume) -> None:
        inherits = volume.id in self._inherited
        self._inherited.discard(volume.id)
        rests = self._rested.pop(volume.id, None) or self._rests_since_before(volume)
        life = self._lives[volume.id] = VolumeLifecycle(
            self._context, volume, inherits=inherits, rests=rests
        )
        self._run(self._attend(life, volume.id), lambda: str(life.volume))

    def _rests_since_before(self, volume: Volume) -> Rest | None:
        """As what an earlier run of the agent has let it go on request, if it has."""
        try:
            state = State(self._context.kernel.remembered(volume))
        except ValueError:
            return None
        words = "safe to remove" if state is State.EJECTED else "before the agent was started"
        return Rest(state, words) if state in {State.EJECTED, State.LOCKED} else None

    async def _attend(self, life: VolumeLifecycle, which: VolumeId) -> None:
        try:
            await life.run()
        except Exception:  # a defect of ours must not cost the other volumes their mounts
            defect = journal.event(journal.Event.DEFECT, volume=life.volume)
            log.exception("%s: a defect of the agent ended its service", life.volume, extra=defect)
            words = "a defect of the agent; the journal has the details"
            life.publish_defect(State.FAILED, words)
            await life.stop_signal.until(lambda: False)
            if life.stop_signal.gone:
                life.publish_defect(State.REMOVED_UNSAFELY, words)
        finally:
            del self._lives[which]
            if life.rests is not None and VolumeId(which.diskseq, 0) in self._at.values():
                self._rested[which] = life.rests
        again = self._next.pop(which, None)
        if again is not None:
            self._begin(again)

    async def _release(self, orphan: Mapping) -> None:
        context = self._context
        worker = context.new_worker(f"sweep {orphan.name}")
        try:
            await release_orphan(
                context.kernel, worker, context.dm_worker, context.mount_points, orphan
            )
        except Exception:  # a defect of ours must not cost present volumes their mounts
            defect = journal.event(journal.Event.DEFECT, mapping=orphan.name)
            log.exception("sweep %s: a defect of the agent ended it", orphan.name, extra=defect)
