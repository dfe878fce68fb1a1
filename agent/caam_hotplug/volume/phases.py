"""The phases of a volume's lifecycle, and what each of them remembers.

There is no state beside the phase: each phase is frozen, and the lifecycle replaces it by the next.
docs/how-it-works.md has the table of what may happen in which phase.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from caam_hotplug.config.rules import Plan
from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import State
from caam_hotplug.volume.holding import Interference, UnfinishedRelease
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.obstacles import Obstacle
from caam_hotplug.volume.requests import Request
from caam_hotplug.volume.target import Target

REREAD: Final = "it was ejected, and its partitions were read anew"
CHANGED: Final = "it was ejected, and others may have written to its disk"


@dataclass(frozen=True, slots=True)
class Failure:
    """What has ended an attempt to serve a volume."""

    words: str
    state: State = State.FAILED
    obstacle: Obstacle = Obstacle.NONE


Cause = Request | Reevaluate | Interference | UnfinishedRelease | Failure
"""What a volume is released for, or is not served for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """What every phase remembers."""

    target: Target | None = None
    """Target of the last attempt."""
    has_leftover: bool = False
    """Whether the kernel may have a mapping or mount of it that this lifecycle does not hold."""
    released_for: Cause | None = None
    """Why it was released, or is not served, while there is a mapping of it."""

    @property
    def goes_on_for(self) -> UnfinishedRelease | None:
        """What it was released for, if that release is to be gone on with."""
        return self.released_for if isinstance(self.released_for, UnfinishedRelease) else None

    def to_evaluate(self, *, goes_on: bool = False) -> Evaluate:
        """Return the phase in which the rules are matched again.

        `goes_on`: after its release has been gone on with, if there is one.
        """
        cause = self.goes_on_for if goes_on else None
        return Evaluate(target=self.target, has_leftover=self.has_leftover, released_for=cause)

    def to_idle(self, obstacle: Obstacle = Obstacle.NONE, *, is_foreign: bool = False) -> Idle:
        """Return the phase in which nothing is held.

        `is_foreign`: a mapping that cannot be adopted now is in the way, to be released on request.
        """
        return Idle(
            target=self.target,
            has_leftover=self.has_leftover or is_foreign,
            obstacle=obstacle,
        )

    def to_parked(self, state: State, reason: str) -> Parked:
        """Return the phase in which nothing is held on request."""
        return Parked(
            target=self.target, has_leftover=self.has_leftover, state=state, reason=reason
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluate(Phase):
    """Identify the volume and match the rules."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Queued(Phase):
    """Wait until the mount point is free."""

    target: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Active(Phase):
    """Set up mapping and mount, keep them in use, tear them down."""

    target: Target
    plan: Plan
    """The plan in force; a reload may replace the target's plan by an equivalent one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Idle(Phase):
    """Hold nothing: ignored, waiting for a blob or for udev, in conflict, or failed."""

    obstacle: Obstacle = Obstacle.NONE
    """What is in its way, so that another attempt is worth it once that has gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parked(Phase):
    """Hold nothing until somebody unlocks it: locked, ejected, or its key was lost in a sleep."""

    state: State
    reason: str

    @classmethod
    def before(cls, mark: Mark | None) -> Parked | None:
        """Return how an earlier run of the agent has released a volume on request, if it has.

        That it was safe to remove is not known any more.
        """
        if mark is not None and mark.released:
            return cls(state=State.LOCKED, reason=mark.released)
        if mark is None or mark.state is None:
            return None
        is_ejected = mark.state is State.EJECTED
        return cls(
            state=State.LOCKED, reason=REREAD if is_ejected else "before the agent was started"
        )


def first_phase(mark: Mark | None, parked: Parked | None, *, has_leftover: bool) -> Phase:
    """Return the phase in which a lifecycle begins, by what was remembered of the volume.

    `parked`: by an earlier lifecycle of this run. A volume that was released is not called locked
    while the kernel may have its mapping, and is not served by it either: its release goes on.
    """
    parked = parked or Parked.before(mark)
    if parked is None:
        return Evaluate(has_leftover=has_leftover)
    has_leftover = has_leftover or parked.has_leftover
    if not has_leftover or parked.state is not State.LOCKED:
        return replace(parked, has_leftover=has_leftover)
    is_ended_by_mount = mark is not None and mark.state is None
    before = UnfinishedRelease(parked.reason, is_ended_by_mount=is_ended_by_mount)
    return Evaluate(has_leftover=True, released_for=before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken(Phase):
    """Wait for the medium to depart: a defect of the agent ended the service of this volume."""
