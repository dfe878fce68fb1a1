"""Release of what an earlier run of the agent has left: mappings, mounts, keys, directories."""

from __future__ import annotations

import logging
from contextlib import AsyncExitStack, ExitStack

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import Mapping
from caam_hotplug.volume.cut_off import CutOff
from caam_hotplug.volume.mapping import release_key, release_mapping
from caam_hotplug.volume.mount import release_mount
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.mount_table import mounts_of
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.stop_signal import Reason, StopSignal
from caam_hotplug.volume.worker import Worker

log = logging.getLogger(__name__)


async def release_leftovers(operations: Operations, uuid: str) -> bool:
    """Release mounts, mapping and key of this DM-UUID, as a lifecycle does at its end.

    Returns whether it was mounted read-write.
    """
    operations.cut_off.is_mapped = True
    async with AsyncExitStack() as then:  # each release runs whether or not one before it failed
        if (volume := names.volume_of_dm_uuid(uuid)) is not None:
            then.push_async_callback(release_key, operations, volume)
        await operations.cut_off.done()
        mapping = await operations.dm("look for the mapping", operations.kernel.find_mapping, uuid)
        if mapping is None:
            return False
        then.push_async_callback(release_mapping, operations, uuid)
        mounts = mounts_of(operations.kernel, mapping)
        for name in mounts:
            then.push_async_callback(release_mount, operations, name, mapping)
        return any(not mount.read_only for mount in mounts.values())


async def find_leftovers(kernel: Kernel, worker: Worker, dm_worker: Worker) -> list[Mapping]:
    """Remove our mount points that nothing is mounted on, and return our mappings.

    The caller adopts or releases the mappings. Raises: DmError if they cannot be listed: without
    them it is not known what is ours.
    """
    operations = _without_medium(kernel, worker, dm_worker, "")
    mappings = await operations.dm("list our mappings", kernel.our_mappings)
    try:
        for name in await operations.call("list our mount points", kernel.our_mount_points):
            try:
                await operations.call("remove the mount point", kernel.remove_mount_point, name)
            except (HotplugError, OSError) as error:
                log.error("remove leftover mount point %s: %s", kernel.mount_root / name, error)
    except (HotplugError, OSError) as error:
        log.error("list leftover mount points in %s: %s", kernel.mount_root, error)
    return mappings


async def release_orphan(
    kernel: Kernel, worker: Worker, dm_worker: Worker, mount_points: MountPoints, orphan: Mapping
) -> None:
    """Release a mapping without a volume. Its mount points stay reserved until then.

    Its medium may hang, so this runs beside the lifecycles of the volumes, not before them.
    """
    volume = names.volume_of_dm_uuid(orphan.uuid)
    extra = fields("leftover-released", VOLUME=volume, MAPPING=orphan.name)
    log.warning("releasing leftover mapping %s: its medium has gone", orphan.name, extra=extra)
    try:
        with ExitStack() as reserved:
            if volume is not None:
                for name in mounts_of(kernel, orphan):
                    reserved.enter_context(mount_points.reserved(name, volume, lambda: None))
            operations = _without_medium(kernel, worker, dm_worker, orphan.uuid)
            await release_leftovers(operations, orphan.uuid)
    except (HotplugError, OSError) as error:
        log.error("release leftover mapping %s: %s", orphan.name, error)


def _without_medium(kernel: Kernel, worker: Worker, dm_worker: Worker, uuid: str) -> Operations:
    stop = StopSignal()
    stop.set(Reason.GONE)
    cut_off = CutOff(kernel, stop, lambda: worker, _log_late, uuid)
    return Operations(kernel, stop, worker, dm_worker, _log_late, cut_off)


def _log_late(why: str | None) -> None:
    if why is not None:
        log.warning("release leftovers: %s", why)
