"""Letting go of what an earlier run of the agent has left and no present volume owns."""

from __future__ import annotations

import logging
from collections.abc import Set as AbstractSet

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.lifecycle.host import Host
from caam_hotplug.lifecycle.lane import Lane
from caam_hotplug.lifecycle.leave import Leave, Reason
from caam_hotplug.lifecycle.resources import mounts_of, release_mapping, release_mount
from caam_hotplug.lifecycle.steps import Steps
from caam_hotplug.model import VolumeId

log = logging.getLogger(__name__)


async def release_left_behind(steps: Steps, uuid: str) -> None:
    """Mounts and mapping of an earlier run are gone, by the same acts that a life ends with."""
    mapping = await steps.dm("look for the mapping", steps.host.find_mapping, uuid)
    if mapping is None:
        return
    for name in mounts_of(steps.host, mapping):
        await release_mount(steps, name, mapping)
    await release_mapping(steps, mapping.uuid)


async def sweep(
    host: Host, lane: Lane, dm_lane: Lane, present: AbstractSet[VolumeId]
) -> set[VolumeId]:
    """Nothing of ours is left of volumes that are not present.

    Returns the present volumes that have a mapping of ours, for their lives to adopt.
    """
    leave = Leave()
    leave.ask(Reason.GONE)
    steps = Steps(host, leave, lane, dm_lane, _say_late)
    inherited: set[VolumeId] = set()
    for mapping in await steps.dm("list our mappings", host.our_mappings):
        volume = names.volume_of_dm_uuid(mapping.uuid)
        if volume in present and volume is not None:
            inherited.add(volume)
            continue
        log.warning("sweeping mapping %s: its medium has gone", mapping.name)
        try:
            await release_left_behind(steps, mapping.uuid)
        except (HotplugError, OSError) as error:
            log.error("sweep mapping %s: %s", mapping.name, error)
    try:
        for name in host.our_mount_points():
            host.remove_mount_point(name)
    except (HotplugError, OSError) as error:
        log.error("sweep mount points in %s: %s", host.mount_root, error)
    return inherited


def _say_late(words: str, is_late: bool) -> None:
    if is_late:
        log.warning("sweep: %s takes long; still waiting", words)
