"""Letting go of what an earlier run of the agent has left and no present volume owns."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, ExitStack

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.api import Host
from caam_hotplug.model import Mapping
from caam_hotplug.volume.mount_points import Claims
from caam_hotplug.volume.operations import Steps, fields
from caam_hotplug.volume.resources import (
    mounts_of,
    release_key,
    release_mapping,
    release_mount,
)
from caam_hotplug.volume.stop_signal import Leave, Reason
from caam_hotplug.volume.worker import Lane

log = logging.getLogger(__name__)


async def release_left_behind(steps: Steps, uuid: str) -> bool:
    """Mounts, mapping and key are gone, by the same acts that a life ends with.

    Returns whether it was mounted for writing.
    """
    async with AsyncExitStack() as then:  # each happens whether or not one before it failed
        if (volume := names.volume_of_dm_uuid(uuid)) is not None:
            then.push_async_callback(release_key, steps, volume)
        mapping = await steps.dm("look for the mapping", steps.host.find_mapping, uuid)
        if mapping is None:
            return False
        then.push_async_callback(release_mapping, steps, uuid)
        mounts = mounts_of(steps.host, mapping)
        for name in mounts:
            then.push_async_callback(release_mount, steps, name, mapping)
        return any(not mount.read_only for mount in mounts.values())


async def sweep(host: Host, lane: Lane, dm_lane: Lane) -> list[Mapping]:
    """No directory of ours is left that nothing is mounted on.

    Returns the mappings that an earlier run has left, to be adopted or released. Raises: DmError
    if they cannot be listed: without them nobody knows what is ours.
    """
    steps = _steps_without_medium(host, lane, dm_lane)
    left = await steps.dm("list our mappings", host.our_mappings)
    try:
        for name in await steps.call("list our mount points", host.our_mount_points):
            try:
                await steps.call("remove the mount point", host.remove_mount_point, name)
            except (HotplugError, OSError) as error:
                log.error("sweep mount point %s: %s", host.mount_root / name, error)
    except (HotplugError, OSError) as error:
        log.error("sweep mount points in %s: %s", host.mount_root, error)
    return left


async def release_orphan(
    host: Host, lane: Lane, dm_lane: Lane, claims: Claims, orphan: Mapping
) -> None:
    """The orphan is gone with its mounts. It owns its mount points until then.

    Its medium may hang, so this happens beside the lives of the others, not before them.
    """
    volume = names.volume_of_dm_uuid(orphan.uuid)
    said = fields("swept", VOLUME=volume, MAPPING=orphan.name)
    log.warning("sweeping mapping %s: its medium has gone", orphan.name, extra=said)
    try:
        with ExitStack() as claimed:
            if volume is not None:
                for name in mounts_of(host, orphan):
                    claimed.enter_context(claims.queued(name, volume, lambda: None))
            await release_left_behind(_steps_without_medium(host, lane, dm_lane), orphan.uuid)
    except (HotplugError, OSError) as error:
        log.error("sweep mapping %s: %s", orphan.name, error)


def _steps_without_medium(host: Host, lane: Lane, dm_lane: Lane) -> Steps:
    leave = Leave()
    leave.ask(Reason.GONE)
    return Steps(host, leave, lane, dm_lane, _say_late)


def _say_late(why: str | None) -> None:
    if why is not None:
        log.warning("sweep: %s", why)
