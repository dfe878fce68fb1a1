"""Configuration files, read whole: anyone's, to inspect, or only root's, to act on.

The configuration decides which media root unlocks and where it mounts them. So what acts on it
reads only what nobody but root could have written.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from caam_hotplug.errors import UnfitFileError, UnsafePathError
from caam_hotplug.kernel import paths

MAX_BYTES: Final = 256 << 10
"""Far more than anyone writes by hand; a mistaken path, to a disk image say, ends here."""

_OPEN: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""Without O_NONBLOCK, to open a FIFO would be to wait for a writer (fifo(7))."""


class AnyonesFiles:
    """Reads to inspect: through links, and files that anyone could have written."""

    def read(self, file: Path) -> bytes:
        """Read the file. Raises: UnfitFileError; OSError."""
        try:
            opened = os.open(file, _OPEN)
        except FileNotFoundError as error:
            if file.is_symlink():
                raise UnfitFileError("is a link that leads nowhere") from error
            raise
        return _content(opened)

    def names(self, folder: Path) -> list[str]:
        """Return the names in the directory, none if it is missing. Raises: OSError."""
        try:
            return os.listdir(folder)
        except FileNotFoundError:
            return []


class RootsFiles:
    """Reads to act on: only what nobody but root could have put there or changed.

    The file and every directory above it must be root's, and nobody else may write to them.
    A link is not followed, wherever it leads.
    """

    def read(self, file: Path) -> bytes:
        """Read the file. Raises: UnsafePathError naming the component; else as AnyonesFiles."""
        file = file.absolute()
        with paths.directory(file.parent, only_root=True) as parent:
            try:
                opened = os.open(file.name, _OPEN | os.O_NOFOLLOW, dir_fd=parent)
            except OSError as error:
                if error.errno != errno.ELOOP:
                    raise
                cause, remedy = "is a symbolic link", "put the file itself there"
                raise UnsafePathError(file, file, cause, remedy) from error
        return _content(opened, file)

    def names(self, folder: Path) -> list[str]:
        """Return the names in the directory. Raises: UnsafePathError; OSError."""
        try:
            with paths.directory(folder.absolute(), only_root=True) as opened:
                return os.listdir(opened)
        except FileNotFoundError:
            return []


def _content(opened: int, only_roots: Path | None = None) -> bytes:
    """Read and close the open file; `only_roots` names it if it must be root's."""
    try:
        status = os.fstat(opened)
        if stat.S_ISDIR(status.st_mode):
            raise UnfitFileError("is a directory")
        if not stat.S_ISREG(status.st_mode):
            raise UnfitFileError("is not a regular file")
        if only_roots is not None:
            paths.require_roots(opened, only_roots, only_root=True)
        content = bytearray()
        while part := os.read(opened, MAX_BYTES + 1 - len(content)):
            content += part
    finally:
        os.close(opened)
    if len(content) > MAX_BYTES:
        raise UnfitFileError(f"has more than {MAX_BYTES} bytes")
    return bytes(content)
