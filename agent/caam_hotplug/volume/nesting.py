"""Whether a mount point lies in another volume's filesystem, or would hide one.

No configuration asks for that, but an earlier run of the agent may have had another one. Whatever
it has left of that is seen here, until somebody has released it.
"""

from __future__ import annotations

from collections.abc import Sequence

from caam_hotplug.errors import shown
from caam_hotplug.model import Mount
from caam_hotplug.names import are_nested
from caam_hotplug.volume.mount_table import is_of, mounts_of, point_of
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.target import Target


async def why_nested(operations: Operations, target: Target, mounts: Sequence[Mount]) -> str:
    """Return which mount of the agent's mappings is above or below the target's place; else "".

    Those of its own mapping that are the agent's do not count: they are released before.
    Raises: HotplugError, OSError.
    """
    kernel, point = operations.kernel, point_of(operations.kernel, target.plan.place)
    near = [
        mount
        for mount in mounts
        if mount.source.startswith("/dev/") and mount.point != point
        if are_nested(mount.point, point)
    ]
    if not near:
        return ""
    for mapping in await operations.dm("list our mappings", kernel.our_mappings):
        own = mounts_of(kernel, mapping).values() if mapping.uuid == target.dm_uuid else ()
        for mount in near:
            if is_of(mount, mapping) and mount not in own:
                relation = "above" if len(mount.point) < len(point) else "below"
                return (
                    f"{shown(mount.source)} is mounted at {shown(mount.point)}, {relation} {point}"
                )
    return ""
