"""New and changed files of a directory (inotify(7)), also of one that does not exist yet."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc

_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x8, 0x80, 0x100
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_Q_OVERFLOW, _IN_IGNORED = 0x400, 0x800, 0x4000, 0x8000
_IN_ONLYDIR: Final = 0x1000000
_WANTED: Final = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE_SELF | _IN_MOVE_SELF
_EVENT: Final = struct.Struct("iIII")
"""struct inotify_event without its name: watch, mask, cookie, length of the name."""
_ROOM: Final = 64 << 10
_CURES: Final = {
    errno.ENOSPC: "raise the sysctl fs.inotify.max_user_watches",
    errno.EMFILE: "raise the sysctl fs.inotify.max_user_instances, or LimitNOFILE= of the service",
}
"""Source: inotify_add_watch(2), inotify_init1(2)."""


class Directory:
    """A directory under watch. Synchronization: loop only.

    While it is missing, the nearest directory above it is watched instead.
    """

    def __init__(self, path: Path) -> None:
        """Raises: KernelError if the kernel has no watch left, with the cure."""
        self._path = path
        with reported_as("watch", str(path), _not_watched):
            self._fileno: int = Libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            self._watched = self._watch = -1
            try:
                self._watch_nearest()
            except OSError:
                self.close()
                raise

    def fileno(self) -> int:
        """Return the descriptor that is readable when `read` has something."""
        return self._fileno

    def close(self) -> None:
        """Stop watching."""
        os.close(self._fileno)

    def read(self) -> list[str | None]:
        """Return the names of new and changed files; None stands for any.

        Raises: KernelError if the directory was replaced and the new one cannot be watched. It is
        watched no more then.
        """
        try:
            events = os.read(self._fileno, _ROOM)
        except BlockingIOError:
            return []
        names: list[str | None] = []
        for mask, name in _parsed(events):
            moved = mask & (_IN_DELETE_SELF | _IN_MOVE_SELF | _IN_Q_OVERFLOW | _IN_IGNORED)
            if moved or self._exists:
                names.append(None if moved else name)
            elif name == self._path.parts[self._watched]:
                names.append(None)  # it was created, or a directory on the path to it
        if None in names:
            with reported_as("watch", str(self._path), _not_watched):
                self._watch_nearest()
            return [None]
        return list(dict.fromkeys(names))

    @property
    def _exists(self) -> bool:
        return self._watched == len(self._path.parts)

    def _watch_nearest(self) -> None:
        """Watch the directory, or the last one that exists on its path."""
        parts, count = self._path.parts, len(self._path.parts)
        denied = 0
        while count:
            at = Path(*parts[:count])
            try:
                watch = Libc.inotify_add_watch(self._fileno, os.fsencode(at), _WANTED | _IN_ONLYDIR)
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.EACCES}:
                    raise
                denied = count if error.errno == errno.EACCES else denied
                count -= 1
                continue
            if self._watch not in {watch, -1}:
                with suppress(OSError):  # EINVAL: the watch went with its directory
                    Libc.inotify_rm_watch(self._fileno, self._watch)
            self._watch, self._watched = watch, count
            if count + 1 in {denied, len(parts) + 1} or not Path(*parts[: count + 1]).is_dir():
                return
            count += 1  # it was created before its parent was watched


def _not_watched(operation: str, path: str, number: int) -> UnknownError:
    return UnknownError(operation, path, number, _CURES.get(number, ""))


def _parsed(events: bytes) -> Iterator[tuple[int, str]]:
    """Yield the mask and name of each event."""
    at = 0
    while at < len(events):
        _, mask, _, length = _EVENT.unpack_from(events, at)
        at += _EVENT.size
        yield mask, os.fsdecode(events[at : at + length].rstrip(b"\0"))
        at += length
