"""Directories in which something is mounted, kept open from before the mount.

Another mount may hide them since, such as one over the mount root: a path leads elsewhere then. The
directory that a mount is on does not keep that mount busy, as one in it would.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.kernel import mount, paths

Mounts = Set[int]
"""Mounts by their numbers, as mountinfo has them."""

_OPEN: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_FDINFO_ROOM: Final = 4096
"""More than the lines of a descriptor that is only a path."""
_MOUNT_ID: Final = re.compile(rb"^mnt_id:\s*([0-9]+)$", re.MULTILINE)


class MountPlaces:
    """The mount root as it was at each mount in it. Any thread; one at a time for one name."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._kept: dict[str, int] = {}

    def keep(self, name: str, path: str, at: int) -> None:
        """Keep the directory that `name` is in: at this path from an open one.

        Without a descriptor for it, the path of the mount root is gone by later.
        """
        with suppress(OSError):
            opened = os.open(path, _OPEN, dir_fd=at)
            self.forget(name)
            self._kept[name] = opened

    def keep_seen(self, name: str) -> None:
        """Keep the directory that the path leads to now. Raises: as `paths.directory`."""
        with paths.directory(self._root) as opened:
            self.keep(name, ".", opened)

    def remove(self, name: str) -> None:
        """Remove the mount point, and keep its directory no more if nothing is mounted there.

        Raises: as `paths.remove_from`.
        """
        with suppress(FileNotFoundError), self.directory(name) as opened:
            if paths.remove_from(opened, name):
                self.forget(name)

    def unmount(self, name: str, which: Mounts, *, lazily: bool = False) -> bool:
        """Unmount what is seen at the name, if it is one of these mounts; return whether it is.

        Raises: as `directory_of`; MountBusyError; MountError.
        """
        with self.directory_of(name, which) as opened:
            if opened is not None:
                mount.unmount(f"/proc/self/fd/{opened}/{name}", lazily=lazily)
        return opened is not None

    def forget(self, name: str) -> None:
        """Keep it no more."""
        opened = self._kept.pop(name, None)
        if opened is not None:
            os.close(opened)

    @contextmanager
    def directory(self, name: str) -> Iterator[int]:
        """Yield the directory that `name` was mounted in, else the one that the path leads to.

        Raises: as `paths.directory`.
        """
        kept = self._kept.get(name)
        if kept is not None:
            yield kept
        else:
            with paths.directory(self._root) as opened:
                yield opened

    @contextmanager
    def directory_of(self, name: str, which: Mounts) -> Iterator[int | None]:
        """Yield a directory in which one of these mounts is what is seen at the name, or None.

        An earlier run may have mounted another filesystem at the same name, in a directory that
        is hidden since. Raises: as `paths.directory`; OSError if it is not known what is seen.
        """
        kept = self._kept.get(name)
        if kept is not None and seen(kept, name) in which:
            yield kept
        else:
            with paths.directory(self._root) as opened:
                yield opened if seen(opened, name) in which else None


def seen(directory: int, name: str) -> int | None:
    """Return the number of the mount that is seen at the name; None if there is no such name.

    Raises: OSError. It does not ask the filesystem: an XFS that has shut down answers no stat(2)
    (xfs_vn_getattr in fs/xfs/xfs_iops.c). Source: proc_pid_fdinfo(5).
    """
    try:
        opened = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        found = _MOUNT_ID.search(_content(f"/proc/self/fdinfo/{opened}"))
    finally:
        os.close(opened)
    return None if found is None else int(found[1])


def _content(file: str) -> bytes:
    """Read a short file of the kernel's."""
    opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(opened, _FDINFO_ROOM)
    finally:
        os.close(opened)
