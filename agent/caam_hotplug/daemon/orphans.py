"""Mappings of an earlier run of the agent whose volume is not there any more."""

from __future__ import annotations

from caam_hotplug.daemon.changed_disks import ChangedDisks
from caam_hotplug.daemon.defects import guarded
from caam_hotplug.model import Mapping
from caam_hotplug.volume.leftovers import release_orphan
from caam_hotplug.volume.record import Context


async def released(context: Context, changed: ChangedDisks, orphan: Mapping) -> None:
    """Release the mapping, and whatever is mounted from it; a failure is logged."""
    words = f"leftover {orphan.name}"
    worker, points = context.new_worker(words), context.mount_points
    with changed.without_volume(orphan):
        release = release_orphan(context.kernel, worker, context.dm_worker, points, orphan)
        await guarded(release, f"release {words}", mapping=orphan.name)
