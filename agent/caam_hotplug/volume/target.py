"""The target of one attempt: the volume as it was known, and the plan of the rule that matched."""

from __future__ import annotations

from dataclasses import dataclass

from caam_hotplug import names
from caam_hotplug.config.rules import Plan
from caam_hotplug.model import Volume


@dataclass(frozen=True, slots=True)
class Target:
    """A volume and the plan for it; all names that it gets are derived from the two."""

    volume: Volume
    plan: Plan

    @property
    def dm_name(self) -> str:
        """Name of the mapping."""
        return names.dm_name(self.volume.id, self.plan.mount_name)

    @property
    def dm_uuid(self) -> str:
        """DM-UUID of the mapping."""
        return names.dm_uuid(self.volume.id)

    @property
    def read_only(self) -> bool:
        """Whether the filesystem is mounted read-only."""
        return self.volume.read_only or self.plan.rule.mount.read_only
