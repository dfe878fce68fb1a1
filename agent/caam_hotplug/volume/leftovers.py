"""Letting go of what an earlier run of the agent has left and no present volume owns."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, ExitStack

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import Mapping
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.resources import (
    mounts_of,
    release_key,
    release_mapping,
    release_mount,
)
from caam_hotplug.volume.stop_signal import Reason, StopSignal
from caam_hotplug.volume.worker import Worker

log = logging.getLogger(__name__)


async def release_leftovers(operations: Operations, uuid: str) -> bool:
    """Mounts, mapping and key are gone, by the same acts that a life ends with.

    Returns whether it was mounted for writing.
    """
    async with AsyncExitStack() as then:  # each happens whether or not one before it failed
        if (volume := names.volume_of_dm_uuid(uuid)) is not None:
            then.push_async_callback(release_key, operations, volume)
        mapping = await operations.dm("look for the mapping", operations.kernel.find_mapping, uuid)
        if mapping is None:
            return False
        then.push_async_callback(release_mapping, operations, uuid)
        mounts = mounts_of(operations.kernel, mapping)
        for name in mounts:
            then.push_async_callback(release_mount, operations, name, mapping)
        return any(not mount.read_only for mount in mounts.values())


async def sweep(kernel: Kernel, worker: Worker, dm_worker: Worker) -> list[Mapping]:
    """No directory of ours is left that nothing is mounted on.

    Returns the mappings that an earlier run has left, to be adopted or released. Raises: DmError
    if they cannot be listed: without them nobody knows what is ours.
    """
    operations = _steps_without_medium(kernel, worker, dm_worker)
    left = await operations.dm("list our mappings", kernel.our_mappings)
    try:
        for name in await operations.call("list our mount points", kernel.our_mount_points):
            try:
                await operations.call("remove the mount point", kernel.remove_mount_point, name)
            except (HotplugError, OSError) as error:
                log.error("sweep mount point %s: %s", kernel.mount_root / name, error)
    except (HotplugError, OSError) as error:
        log.error("sweep mount points in %s: %s", kernel.mount_root, error)
    return left


async def release_orphan(
    kernel: Kernel, worker: Worker, dm_worker: Worker, mount_points: MountPoints, orphan: Mapping
) -> None:
    """The orphan is gone with its mounts. It owns its mount points until then.

    Its medium may hang, so this happens beside the lives of the others, not before them.
    """
    volume = names.volume_of_dm_uuid(orphan.uuid)
    said = fields("leftover-released", VOLUME=volume, MAPPING=orphan.name)
    log.warning("sweeping mapping %s: its medium has gone", orphan.name, extra=said)
    try:
        with ExitStack() as claimed:
            if volume is not None:
                for name in mounts_of(kernel, orphan):
                    claimed.enter_context(mount_points.queued(name, volume, lambda: None))
            await release_leftovers(_steps_without_medium(kernel, worker, dm_worker), orphan.uuid)
    except (HotplugError, OSError) as error:
        log.error("sweep mapping %s: %s", orphan.name, error)


def _steps_without_medium(kernel: Kernel, worker: Worker, dm_worker: Worker) -> Operations:
    stop_signal = StopSignal()
    stop_signal.ask(Reason.GONE)
    return Operations(kernel, stop_signal, worker, dm_worker, _say_late)


def _say_late(why: str | None) -> None:
    if why is not None:
        log.warning("sweep: %s", why)
