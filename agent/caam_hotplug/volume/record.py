"""One volume's facts, phase, status and requests; events from outside change them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from caam_hotplug.config.rules import NeedsUdev, NoMatch, OnStop, Plan, Rule, match_rules
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import State, Volume
from caam_hotplug.volume.facts import Facts
from caam_hotplug.volume.hooks import Units
from caam_hotplug.volume.inbox import Inbox, Reevaluate
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.phases import Active, Broken, Idle, Parked, Phase
from caam_hotplug.volume.requests import Ask, Request, refusal
from caam_hotplug.volume.status import Publish, VolumeStatus
from caam_hotplug.volume.stop_signal import Reason, StopSignal
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.worker import Worker


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


class Record:
    """What is known and wanted of one volume. Each event is noted, and wakes the lifecycle.

    Synchronization: loop only.
    """

    def __init__(self, context: Context, volume: Volume, phase: Phase) -> None:
        self.context = context
        self.phase = phase
        self.status = VolumeStatus(volume, context.publish)
        self.stop = StopSignal()
        self.facts = Facts(volume)
        self.inbox = Inbox(self.stop, lambda: self.volume)
        self.has_slept = False
        """Whether the machine has slept since the active volume was last compared."""
        if isinstance(phase, Parked):
            self.status.publish(phase.state, phase.reason, is_parked=True)

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
        if self.stop.lost_in_sleep:
            return self.phase.to_parked(State.REMOVED_UNSAFELY, self.stop.words)
        return self.phase if isinstance(self.phase, Parked) else None

    # Events from outside.

    def update(self, report: Volume) -> None:
        """Note a report about the volume, perhaps with other facts."""
        before = self.volume
        merged = self.facts.merge(before, report, needs_udev=self._needs_udev(before))
        if merged.volume != before:
            self.status.volume = merged.volume
            may_confirm = merged.is_udevs_first or (merged.is_kept and not self._is_in_conflict)
            if may_confirm and self._is_confirmed():
                return  # a report that confirms an attempt is no reason to repeat it
            self.inbox.note(Reevaluate.UDEV if merged.is_udevs_first else Reevaluate.FACTS)
        if self.status.state is State.WAITING or self._is_in_conflict:  # its cause may have ended
            self.inbox.note(Reevaluate.FACTS)
        self.stop.wake()

    def blob_appeared(self, blob: str | None) -> None:
        """Note that the blob of this file name is there, or with None that any may be.

        That matters also while it is being read, and perhaps was not there yet; or if it was
        refused, and perhaps was only half written.
        """
        path = None if blob is None else str(self.context.kernel.blob_directory / blob)
        waits = self.status.state in {State.WAITING, State.UNLOCKING, State.CONFLICT}
        if (waits or self._retries_on_blob) and path in {None, self.status.blob}:
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
        serving = {State.MOUNTED, State.UNLOCKED, State.DETACHING}  # it may be in use, and stay
        active = self.phase if isinstance(self.phase, Active) else None
        plan = active.plan if active else match_rules(self.context.rules, self.volume)
        holds = self.phase.has_leftover or (active is not None and self.status.state in serving)
        keeps = isinstance(plan, Plan) and plan.rule.on_stop is OnStop.KEEP
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

    def park(self, state: State, reason: str) -> None:
        """Make the volume locked or ejected, publish that, and remember it across restarts."""
        self.phase = self.phase.to_parked(state, reason)
        self.context.kernel.remember(self.volume, state.value)
        self.status.publish(state, reason)

    def repark(self, state: State, reason: str) -> None:
        """As `park`, for a volume that is parked already."""
        if self.parked is not None and not self.stop.is_set:
            self.park(state, reason)

    def publish_defect(self, state: State) -> None:
        """Publish that a defect of the agent ended the service of this volume."""
        self.phase = Broken()
        self.status.forget_mapping()
        self.status.publish(state, "a defect of the agent; the journal has the details")

    # Rules.

    def take_reason_to_release(self, target: Target) -> Reevaluate | None:
        """Take out what has changed, if rules and facts ask for something else than is held."""
        # Once: users who refuse to release it are asked again only after another change.
        change = self.inbox.take_change()
        if change is None:
            return None
        plan = match_rules(self.context.rules, self.volume)
        if self._continues(target, plan) or isinstance(plan, NeedsUdev):
            return None
        return change

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
        if self.status.state is State.FAILED and not self._retries_on_blob:
            return False
        target = self.phase.target
        plan = match_rules(self.context.rules, self.volume)
        return target is not None and self._continues(target, plan)

    def _needs_udev(self, volume: Volume) -> bool:
        """Whether the rules cannot be matched without udev's report."""
        if isinstance(self.phase, Active) or not volume.awaits_udev:
            return False
        return not isinstance(match_rules(self.context.rules, volume), Plan)

    @property
    def _is_in_conflict(self) -> bool:
        """Whether the mount point was occupied by others than volumes of the agent."""
        return isinstance(self.phase, Idle) and self.status.state is State.CONFLICT

    @property
    def _retries_on_blob(self) -> bool:
        return isinstance(self.phase, Idle) and self.phase.retry_on_blob
