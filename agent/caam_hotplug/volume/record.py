"""One volume's facts, phase, status and requests; events from outside change them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from caam_hotplug import names
from caam_hotplug.config.rules import NeedsUdev, NoMatch, OnStop, Plan, Rule, match_rules
from caam_hotplug.errors import WritesLostError, is_passing
from caam_hotplug.formats.marks import Mark
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import State, Volume
from caam_hotplug.volume.cut_off import CutOff
from caam_hotplug.volume.facts import Facts
from caam_hotplug.volume.holding import Holding, UnfinishedRelease
from caam_hotplug.volume.hooks import Units
from caam_hotplug.volume.inbox import Inbox, Reevaluate
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.obstacles import MAY_WANT_BLOB, OF_BLOBS, Obstacle
from caam_hotplug.volume.phases import Active, Broken, Idle, Parked, Phase
from caam_hotplug.volume.requests import Ask, Request, refusal
from caam_hotplug.volume.retry_delay import RetryDelay
from caam_hotplug.volume.status import Publish, VolumeStatus, with_loss
from caam_hotplug.volume.stop_signal import Reason, StopSignal
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.worker import Worker

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Context:
    """What all volumes share."""

    kernel: Kernel
    rules: tuple[Rule, ...]
    """The rules in force; `Supervisor.reevaluate` replaces them."""
    new_worker: Callable[[str], Worker]
    dm_worker: Worker
    """The one worker of all mappings."""
    mount_points: MountPoints
    publish: Publish
    units: Units
    keeps: bool | None = None
    """Whether mounted media stay when the agent stops, if the rules are not to say that."""


class Record:
    """What is known and wanted of one volume. Each event is noted, and wakes the lifecycle.

    Synchronization: loop only.
    """

    def __init__(self, context: Context, volume: Volume, phase: Phase, lost: str = "") -> None:
        self.context = context
        self.phase = phase
        self.lost = lost
        """What could not be written to the volume since it was inserted; empty if all was."""
        self.released = phase.goes_on_for
        """What it was released for, while others may hold its mapping."""
        self.status = VolumeStatus(volume, context.publish)
        self.stop = StopSignal()
        self.cut_off = CutOff(
            context.kernel, self.stop, partial(context.new_worker, f"departure {volume.id}"),
            self.status.publish_late, names.dm_uuid(volume.id),
        )  # fmt: skip
        self.cut_off.is_mapped = phase.has_leftover
        self.holding = Holding(self.stop.wake)
        self.facts = Facts(volume)
        self.inbox = Inbox(self.stop, lambda: self.volume)
        self.mounts = True
        """Whether it is mounted when it is unlocked, if its rule says so."""
        self._retry_delay = RetryDelay()
        self.is_agent_stopping = False
        self.has_slept = False
        """Whether the machine has slept since the active volume was last compared."""
        if isinstance(phase, Parked):
            self.status.publish(phase.state, with_loss(phase.reason, lost), is_parked=True)

    @property
    def volume(self) -> Volume:
        """The volume as it is known now."""
        return self.status.volume

    @property
    def udev_status(self) -> tuple[bool, bool]:
        """Whether udev has reported the volume, and whether its report is still awaited."""
        return self.facts.udevs_report is not None, self.volume.awaits_udev

    @property
    def parked(self) -> Parked | None:
        """How the volume waits for a request, if it does, or its next lifecycle will."""
        if self.stop.lost_in_sleep and not isinstance(self.phase, Parked):
            return self.phase.to_parked(State.REMOVED_UNSAFELY, self.stop.words)
        return self.phase if isinstance(self.phase, Parked) else None

    # Events from outside.

    def update(self, report: Volume) -> None:
        """Note a report about the volume, perhaps with other facts."""
        before, self.inbox.is_reported = self.volume, True
        merged = self.facts.merge(before, report, needs_udev=self._needs_udev(before))
        if merged.volume != before:
            self.status.volume = merged.volume
            is_in_conflict = Obstacle.MOUNT_POINT in self.obstacle
            may_confirm = merged.is_udevs_first or (merged.is_kept and not is_in_conflict)
            if may_confirm and self._is_confirmed():
                return  # a report that confirms an attempt is no reason to repeat it
            self.inbox.note(Reevaluate.UDEV if merged.is_udevs_first else Reevaluate.FACTS)
        if self.obstacle & ~OF_BLOBS or self.status.state is State.WAITING:  # it may have gone
            self.inbox.note(Reevaluate.FACTS)
        self.stop.wake()

    def read_from_disk(self, found: Volume) -> None:
        """Note what the disk says of the volume: `found` was read after all reports so far."""
        merged = self.facts.read(self.volume, found)
        if words := self.facts.contradiction(merged):
            log.warning("%s: %s; what the disk says counts", merged, words)
        if merged != self.volume:
            self.status.volume = merged

    def blob_appeared(self, blob: str | None) -> None:
        """Note that the blob of this file name is there, or with None that any may be.

        That matters also while it is being read, and perhaps was not there yet; or if it was
        refused, and perhaps was only half written.
        """
        self.inbox.has_new_blob = True
        path = None if blob is None else str(self.context.kernel.blob_directory / blob)
        wants = self.status.state in MAY_WANT_BLOB or self.obstacle & OF_BLOBS
        if wants and (Obstacle.ANY_BLOB in self.obstacle or path in {None, self.status.blob}):
            self.inbox.note(Reevaluate.FACTS)

    def machine_woke(self) -> None:
        """Note that the machine has slept: an active volume is compared with what it was."""
        self.has_slept = True
        self.stop.wake()

    def rules_changed(self) -> None:
        """Note that other rules are in force."""
        self.inbox.note(Reevaluate.RULES)

    def agent_stops(self) -> None:
        """End the lifecycle: release the volume, or leave it mounted if its rule says so."""
        self.is_agent_stopping = True
        serving = {State.MOUNTED, State.UNLOCKED, State.DETACHING}  # it may be in use, and stay
        active = self.phase if isinstance(self.phase, Active) else None
        plan = active.plan if active else match_rules(self.context.rules, self.volume)
        holds = self.phase.has_leftover or (active is not None and self.status.state in serving)
        by_rule = isinstance(plan, Plan) and plan.rule.on_stop is OnStop.KEEP
        keeps = by_rule if self.context.keeps is None else self.context.keeps
        self.stop.set(Reason.KEEP if keeps and holds else Reason.STOP)

    def medium_gone(self) -> None:
        """End the lifecycle: the medium has departed."""
        self.stop.set(Reason.GONE)
        if self.status.state is State.REMOVED_UNSAFELY:  # parked until now
            self.status.publish_facts()

    def retry_if_udev_reported(self, before: tuple[bool, bool]) -> None:
        """Have a failed attempt repeated if it might have succeeded after udev's report.

        `before`: `udev_status` when it began.
        """
        if self.udev_status != before:
            self.inbox.note(Reevaluate.FACTS)

    def retry_if_passing(self, error: Exception) -> str:
        """Have a failed attempt repeated if the error passes by itself; return words about that."""
        if not is_passing(error) or self.inbox.wants_release or self.stop.is_set:
            return ""
        asyncio.get_running_loop().call_later(self._retry_delay.next_s(), self._retry)
        return "; it is tried again"

    async def may_release_again(self, error: Exception) -> bool:
        """Wait until a failed release may be repeated; False if another attempt would not help.

        Without its medium, a volume keeps its mount point reserved as long as it is mounted there.
        """
        if not (is_passing(error) and self.stop.medium_gone) or self.is_agent_stopping:
            return False
        await asyncio.sleep(self._retry_delay.next_s())
        return True

    def _retry(self) -> None:
        if isinstance(self.phase, Idle) and self.status.state is State.FAILED:
            self.inbox.note(Reevaluate.FACTS)

    async def ask(self, request: Request) -> None:
        """Have the request carried out. Raises: RequestRefusedError."""
        self.inbox.ask(request, self.why_not(request.ask))
        await request.answer

    def why_not(self, ask: Ask) -> str | None:
        """Return why this cannot be asked now, or None if it can."""
        if isinstance(self.phase, Broken):
            return "a defect of the agent ended its service; pull it, or restart the agent"
        if self.stop.is_set:
            return f"it is being released: {self.stop.words}"
        if self.inbox.request is not None:
            return f"{self.inbox.request.ask.value} was asked for before and is not done yet"
        if self.status.late is not None:
            return "the kernel does not answer; pull the medium, or wait"
        return refusal(ask, self.status.state)

    def park(self, state: State, reason: str, *, is_held: bool = False) -> None:
        """Make the volume locked or ejected, publish that, and remember it across restarts.

        What could not be written is said, too. `is_held`: its disk is held against all others.
        """
        reason = with_loss(reason, self.lost)
        self.phase, self.mounts, self.released = self.phase.to_parked(state, reason), True, None
        self._remember(state, is_held=is_held)
        self.status.publish(state, reason)

    def repark(self, state: State, reason: str, *, is_held: bool = False) -> None:
        """As `park`, for a volume that is parked already."""
        if self.parked is not None and not self.stop.is_set:
            self.park(state, reason, is_held=is_held)

    def unpark(self, *, mounts: bool = True) -> None:
        """Have this and later runs of the agent serve the volume, with a mount or without."""
        self.mounts, self.released = mounts, None
        self._remember(None)

    def note_release(self, words: str) -> None:
        """Remember, also across restarts, what it is released for, until it is."""
        self.released = UnfinishedRelease(words)
        self._remember(None)

    def note_lost(self, error: BaseException | None) -> None:
        """Remember, also across restarts, which write has failed, if one has. The first stays."""
        if isinstance(error, WritesLostError) and not self.lost:
            self.lost = str(error)
            log.warning("%s: %s", self.volume, error)
            self._remember(self.phase.state if isinstance(self.phase, Parked) else None)

    def relocate(self, found: Volume) -> None:
        """Note where the kernel has the volume, after it has read the partitions anew."""
        place = {each: getattr(found, each) for each in ("name", "number", "size", "read_only")}
        self.status.volume = replace(self.volume, **place)

    def _remember(self, state: State | None, *, is_held: bool = False) -> None:
        released = self.released.words if self.released else ""
        mark = Mark(self.volume, state, is_held, self.lost, not self.mounts, released)
        text = "" if mark == Mark(self.volume) else mark.to_text()
        self.context.kernel.remember(self.volume, text)

    def take_reason_to_release(self, target: Target) -> Reevaluate | None:
        """Take out what has changed, if rules and facts ask for something else than is held."""
        # Once: users who refuse to release it are asked again only after another change.
        change = self.inbox.take_change()
        return change if change is not None and self.wants_another(target) else None

    def wants_another(self, target: Target) -> bool:
        """Whether rules and facts ask for something else than the target has."""
        plan = match_rules(self.context.rules, self.volume)
        return not (self._continues(target, plan) or isinstance(plan, NeedsUdev))

    def plan_in_force(self, target: Target) -> Plan:
        """Return the plan by which the target is held now."""
        return self.phase.plan if isinstance(self.phase, Active) else target.plan

    def _continues(self, target: Target, plan: Plan | NoMatch | NeedsUdev) -> bool:
        """Whether the plan asks for what the target has; if so, put it in force."""
        if not (isinstance(plan, Plan) and plan.makes_the_same(target.plan)):
            return False
        if target.volume.read_only != self.volume.read_only:
            return False
        if isinstance(self.phase, Active):
            self.phase = replace(self.phase, plan=plan)
        self.status.publish_facts(rule=plan.rule.name)
        return True

    def _is_confirmed(self) -> bool:
        """Whether a report changes nothing about the last attempt.

        An attempt that failed before udev's report might have succeeded after it.
        """
        if self.status.state is State.FAILED and not self.obstacle & OF_BLOBS:
            return False
        target = self.phase.target
        plan = match_rules(self.context.rules, self.volume)
        return target is not None and self._continues(target, plan)

    def _needs_udev(self, volume: Volume) -> bool:
        """Whether the rules cannot be matched without udev's report."""
        may_need = volume.awaits_udev and not isinstance(self.phase, Active)
        return may_need and not isinstance(match_rules(self.context.rules, volume), Plan)

    @property
    def obstacle(self) -> Obstacle:
        """What is in the way of an idle volume."""
        return self.phase.obstacle if isinstance(self.phase, Idle) else Obstacle.NONE
