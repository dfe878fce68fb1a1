"""The mounts of a mapping, read from the kernel's table of mounts.

The table is read on the loop, not by a worker. It lies in memory, and the lock that it is read
under (namespace_sem, fs/namespace.c) is never held over I/O, so reading cannot hang as a mount or
an unmount can. It can fail, such as for want of a file descriptor.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import Mapping, Mount


def mounts_of(kernel: Kernel, mapping: Mapping) -> dict[str, Mount]:
    """Return the mapping's mounts in the mount root, by their names there."""
    found = ((Path(mount.point), mount) for mount in kernel.mounts() if is_of(mount, mapping))
    return {point.name: mount for point, mount in found if point.parent == kernel.mount_root}


def mounted_elsewhere(kernel: Kernel, mapping: Mapping) -> list[str]:
    """Return where others have mounted the mapping, outside the mount root."""
    points = (mount.point for mount in kernel.mounts() if is_of(mount, mapping))
    return [point for point in points if Path(point).parent != kernel.mount_root]


def mount_at(kernel: Kernel, name: str) -> Mount | None:
    """Return the topmost mount at a name in the mount root, or None."""
    return next(reversed(mounts_at(kernel, name)), None)


def mounts_at(kernel: Kernel, name: str) -> list[Mount]:
    """Return all mounts at a name in the mount root, the topmost last."""
    point = str(kernel.mount_root / name)
    return [mount for mount in kernel.mounts() if mount.point == point]


def first_of(mapping: Mapping, mounts: Iterable[Mount]) -> Mount | None:
    """Return the first of the mounts that shows the mapping, or None."""
    return next((mount for mount in mounts if is_of(mount, mapping)), None)


def is_of(mount: Mount, mapping: Mapping) -> bool:
    """Whether the mount shows the mapping; btrfs gives its mounts a device number of their own."""
    sources = {mapping.node, f"/dev/mapper/{mapping.name}"}
    return mount.number == mapping.number or mount.source in sources
