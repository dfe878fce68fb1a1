"""Directories of mount points that a run of the agent has made, and that nobody uses any more."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from caam_hotplug.errors import HotplugError
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.mount_table import point_of
from caam_hotplug.volume.operations import Operations

log = logging.getLogger(__name__)


async def remove_left(
    operations: Operations, mount_points: MountPoints, look: Callable[[], Iterable[str]]
) -> None:
    """Remove those of the places that `look` finds; what cannot be removed is logged."""
    kernel = operations.kernel
    try:
        places = await operations.call("list mount points", look)
    except (HotplugError, OSError) as error:
        log.error("list leftover mount points in %s: %s", kernel.mount_root, error)
        return
    for place in places:
        try:
            if mount_points.owner(place) is None:
                remove = kernel.remove_mount_point
                await operations.call("remove the mount point", remove, place)
        except (HotplugError, OSError) as error:
            log.error("remove leftover mount point %s: %s", point_of(kernel, place), error)
