"""The mounts of a mapping, read from the kernel's table of mounts.

The table is read on the loop, not by a worker. It lies in memory, and the lock that it is read
under (namespace_sem, fs/namespace.c) is never held over I/O, so reading cannot hang as a mount or
an unmount can. It can fail, such as for want of a file descriptor.

Several mounts can have the same point as text: one over the other, a copy that the kernel made in a
peer of the directory below (mount_namespaces(7)), one that a mount over the directory hides. Which
lies on which is in the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from caam_hotplug.kernel.api import Kernel
from caam_hotplug.kernel.mountinfo import NAMES_ITS_DEVICE
from caam_hotplug.model import Mapping, Mount
from caam_hotplug.names import is_path


def mounts_of(kernel: Kernel, mapping: Mapping) -> dict[str, Mount]:
    """Return the mapping's mounts that are the agent's, by their places.

    They are those in the mount root, and the one at the path that a run of the agent has noted.
    """
    found = [mount for mount in kernel.mounts() if is_of(mount, mapping)]
    own = kernel.place_of(mapping) if found else ""
    return {place: mount for mount in found if (place := _place(kernel, mount.point, own))}


def places_of(kernel: Kernel, mapping: Mapping) -> list[str]:
    """Return the agent's places of the mapping, also the noted one if others have unmounted it."""
    mounted = mounts_of(kernel, mapping) if mapping.open_count else {}
    return list(dict.fromkeys(filter(None, (*mounted, kernel.place_of(mapping)))))


def _place(kernel: Kernel, point: str, own: str) -> str:
    """Return the agent's place for the point; empty if it is none. `own`: a path of its own."""
    if Path(point).parent == kernel.mount_root:
        return Path(point).name
    return own if own and point == point_of(kernel, own) else ""


def point_of(kernel: Kernel, place: str) -> str:
    """Return the path of the mount point, as the table of mounts has it."""
    return kernel.point_of(place) if is_path(place) else f"{kernel.mount_root}/{place}"


def points_of(kernel: Kernel, mapping: Mapping) -> list[str]:
    """Return where the mapping is mounted."""
    return [mount.point for mount in kernel.mounts() if is_of(mount, mapping)]


def mounted_elsewhere(kernel: Kernel, mapping: Mapping) -> list[str]:
    """Return where others have mounted the mapping, at no place of the agent's."""
    own = kernel.place_of(mapping)
    return [point for point in points_of(kernel, mapping) if not _place(kernel, point, own)]


def mounts_at(kernel: Kernel, place: str, mapping: Mapping | None = None) -> list[Mount]:
    """Return the mounts at a mount point, one over the other, the topmost last.

    They are those that the path leads to. If none of them shows the mapping, they are one of it
    that is hidden, and those over that one.
    """
    return mounts_among(kernel.mounts(), point_of(kernel, place), mapping)


def mounts_among(
    mounts: Sequence[Mount], point: str, mapping: Mapping | None = None
) -> list[Mount]:
    """As `mounts_at`, of mounts that were read already."""
    seen = [mount for mount in _on_the_way(mounts, point) if mount.point == point]
    if mapping is None or first_of(mapping, seen) is not None:
        return seen
    hidden = first_of(mapping, (mount for mount in mounts if mount.point == point))
    return seen if hidden is None else [hidden, *_over(mounts, hidden)]


def with_copies(mounts: Sequence[Mount], mount: Mount) -> frozenset[int]:
    """Return the number of the mount, and of its copies with the same point."""
    same = (mount.number, mount.point)
    found = (each for each in mounts if (each.number, each.point) == same)
    return frozenset(each.identity for each in (mount, *found))


def cover_of(mounts: Sequence[Mount], mount: Mount) -> Mount | None:
    """Return the mount that is seen instead at the place of this one, or None."""
    seen = [*_on_the_way(mounts, mount.point)][-1:]
    return None if not seen or seen[0].identity == mount.identity else seen[0]


def _on_the_way(mounts: Sequence[Mount], path: str) -> Iterator[Mount]:
    """Yield the mounts that the kernel crosses on its way to the path."""
    numbers = {mount.identity for mount in mounts}
    left = [mount for mount in mounts if _is_prefix(mount.point, path)]
    on = [mount for mount in left if mount.parent not in numbers]
    while on:
        # What is mounted at the first component of the path is crossed first.
        crossed = min(reversed(on), key=lambda mount: len(mount.point))
        yield crossed
        on = [mount for mount in left if mount.parent == crossed.identity != mount.identity]


def _over(mounts: Sequence[Mount], below: Mount) -> Iterator[Mount]:
    over: Mount | None = below
    while over is not None:
        on = over.identity
        over = next((m for m in mounts if m.parent == on and m.point == below.point), None)
        if over is not None:
            yield over


def _is_prefix(point: str, path: str) -> bool:
    return path == point or path.startswith(f"{point.rstrip('/')}/")


def first_of(mapping: Mapping, mounts: Iterable[Mount]) -> Mount | None:
    """Return the first of the mounts that shows the mapping, or None."""
    return next((mount for mount in mounts if is_of(mount, mapping)), None)


def is_of(mount: Mount, mapping: Mapping) -> bool:
    """Whether the mount shows the mapping.

    Its source says so only where that is the kernel's own text: a user can name a FUSE's as any.
    """
    sources = {mapping.node, f"/dev/mapper/{mapping.name}"}
    names_it = mount.filesystem in NAMES_ITS_DEVICE and mount.source in sources
    return mount.number == mapping.number or names_it
