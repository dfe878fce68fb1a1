"""Directories in which something is mounted, kept open from before the mount.

Another mount may hide them since, such as one over the mount root: a path leads elsewhere then. The
directory that a mount is on does not keep that mount busy, as one in it would.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.kernel import paths
from caam_hotplug.kernel.filesystem_errors import FilesystemErrors

_OPEN: Final = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


class MountPlaces:
    """The mount root as it was at each mount in it. Any thread; one at a time for one name."""

    def __init__(self, root: Path, errors: FilesystemErrors | None = None) -> None:
        """`errors`: reports those of what is mounted."""
        self._root = root
        self._errors = errors or FilesystemErrors()
        self._kept: dict[str, int] = {}

    def keep(self, name: str, path: str, at: int) -> None:
        """Keep the directory that `name` is in: at this path from an open one.

        Without a descriptor for it, the path of the mount root is gone by later.
        """
        with suppress(OSError):
            opened = os.open(path, _OPEN, dir_fd=at)
            self.forget(name)
            self._kept[name] = opened
            self._errors.add(opened, name)

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
