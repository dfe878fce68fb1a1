"""Directories in which something is mounted, kept open from before the mount.

Another mount may hide them since, such as one over the mount root: a path leads elsewhere then. The
directory that a mount is on does not keep that mount busy, as one in it would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import MountError
from caam_hotplug.kernel import mount, mount_directories, mountinfo
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.names import is_path, name_of

Mounts = Set[int]
"""Mounts by their numbers, as mountinfo has them."""

_OPEN: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class MountPlaces:
    """The directory of each mount point, as it was at the mount. One thread at a time for each."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: dict[str, int] = {}

    def keep(self, place: str, path: str, at: int) -> None:
        """Keep the directory that the mount point is in: at this path from an open one.

        Without a descriptor for it, its path is gone by later. That is also so of one outside the
        mount root where another filesystem is mounted, such as a partition at /srv. Open, it would
        keep that busy, and `umount -R /srv` or systemd unmounts it right after what is in it.
        """
        with suppress(OSError):
            opened = os.open(path, _OPEN, dir_fd=at)
            self.forget(place)
            if is_path(place) and _is_mounted_on(opened):
                os.close(opened)
            else:
                self._kept[place] = opened

    def keep_seen(self, place: str) -> None:
        """Keep the directory that the path leads to now. Raises: as `paths.directory`."""
        with mount_directories.parent_to_leave(self._root, place) as opened:
            self.keep(place, ".", opened)

    def remove(self, place: str) -> None:
        """Remove the mount point, and keep its directory no more if nothing is mounted there.

        Raises: as `mount_directories.remove_from`.
        """
        with suppress(*mount_directories.not_there(place)), self.directory(place) as opened:
            if mount_directories.remove_from(opened, place):
                self.forget(place)

    def unmount(self, place: str, which: Mounts, *, lazily: bool = False) -> bool:
        """Unmount what is seen at the place, if it is one of these mounts; return whether it is.

        Raises: UnsafePathError; MountBusyError; MountError.
        """
        point = self.point(place)
        try:
            with (
                reported_as("unmount", point, MountError),
                self.directory_of(place, which) as opened,
            ):
                if opened is not None:
                    mount.unmount(f"/proc/self/fd/{opened}/{name_of(place)}", lazily=lazily)
        except MountError as error:  # which has the path by the descriptor
            raise type(error)("unmount", point, error.errno or 0) from error
        return opened is not None

    def forget(self, place: str) -> None:
        """Keep it no more."""
        opened = self._kept.pop(place, None)
        if opened is not None:
            os.close(opened)

    def point(self, place: str) -> str:
        """Return the path of the mount point, also if a directory above was renamed since.

        Any thread: what another has closed meanwhile may be something else by then.
        """
        kept = self._kept.get(place) if is_path(place) else None
        if kept is not None:
            with suppress(OSError):
                above = Path(f"/proc/self/fd/{kept}").readlink()
                if self._kept.get(place) == kept:
                    return str(above / name_of(place))
        return str(self._root / place)

    @contextmanager
    def directory(self, place: str) -> Iterator[int]:
        """Yield the directory that something was mounted in, else the one that the path leads to.

        Raises: as `paths.directory`.
        """
        kept = self._kept.get(place)
        if kept is not None:
            yield kept
        else:
            with mount_directories.parent_to_leave(self._root, place) as opened:
                yield opened

    @contextmanager
    def directory_of(self, place: str, which: Mounts) -> Iterator[int | None]:
        """Yield a directory in which one of these mounts is what is seen at the place, or None.

        An earlier run may have mounted another filesystem at the same place, in a directory that
        is hidden since. Raises: as `paths.directory`; OSError if it is not known what is seen.
        """
        kept = self._kept.get(place)
        if kept is not None and seen(kept, place) in which:
            yield kept
        else:
            with mount_directories.parent_to_leave(self._root, place) as opened:
                yield opened if seen(opened, place) in which else None


def _is_mounted_on(opened: int) -> bool:
    """Whether the open directory is the uppermost of its mount, and not the root."""
    above = os.open("..", _OPEN, dir_fd=opened)
    try:
        return mountinfo.mount_of(above) != mountinfo.mount_of(opened)
    finally:
        os.close(above)


def seen(directory: int, place: str) -> int | None:
    """Return the number of the mount that is seen there by its name; None if it has none.

    Raises: OSError.
    """
    try:
        return mountinfo.mount_at(directory, name_of(place))
    except FileNotFoundError:
        return None
