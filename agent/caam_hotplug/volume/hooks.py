"""The systemd units of a rule: one started after the mount, one run before the unmount."""

from __future__ import annotations

from typing import Protocol

from caam_hotplug.config.rules import Action, Plan
from caam_hotplug.volume.stop_signal import StopSignal


class Units(Protocol):
    """The service manager, as far as a volume's lifecycle needs it.

    Neither method raises: a unit that fails changes nothing for the volume, and is logged.
    """

    def start(self, unit: str) -> None:
        """Ask the service manager to start the unit, and do not wait."""
        ...

    async def finish(self, unit: str, within_s: float) -> None:
        """Start the unit, and wait until it has ended, failed, or used up its time."""
        ...


class Hooks:
    """The units of one activation: for each mount, at most one unmount unit is run."""

    def __init__(self, units: Units, stop: StopSignal) -> None:
        self._units = units
        self._stop = stop
        self._mounted_by: Plan | None = None
        """Plan of the mount whose unmount unit has not been run yet."""

    def mounted(self, plan: Plan) -> None:
        """Start the unit that follows a mount. A plan that only unlocks has none."""
        if plan.rule.action is not Action.MOUNT:
            return
        self._mounted_by = plan
        if plan.on_mount is not None:
            self._units.start(plan.on_mount)

    async def unmounting(self, plan: Plan) -> None:
        """Run the unit that precedes an unmount; do not wait for it without a medium."""
        mounted_by, self._mounted_by = self._mounted_by, None
        if mounted_by is None or plan.on_unmount is None:
            return
        if self._stop.medium_gone:
            self._units.start(plan.on_unmount)
        else:
            end = self._units.finish(plan.on_unmount, plan.rule.unit_within_s)
            await self._stop.unless_gone(end)
