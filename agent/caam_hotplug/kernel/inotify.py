"""A directory whose new files are told of (inotify(7)), also one that is not there yet."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from caam_hotplug.kernel.libc import Libc

_IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x8, 0x80, 0x100
_IN_DELETE_SELF, _IN_MOVE_SELF, _IN_Q_OVERFLOW, _IN_IGNORED = 0x400, 0x800, 0x4000, 0x8000
_IN_ONLYDIR: Final = 0x1000000
_WANTED: Final = _IN_CLOSE_WRITE | _IN_MOVED_TO | _IN_CREATE | _IN_DELETE_SELF | _IN_MOVE_SELF
_EVENT: Final = struct.Struct("iIII")
"""struct inotify_event without its name: watch, mask, cookie, length of the name."""
_ROOM: Final = 64 << 10


class Directory:
    """A directory under watch. Synchronization: loop only.

    While it is missing, the nearest directory above it is watched instead.
    """

    def __init__(self, path: Path) -> None:
        """Raises: OSError."""
        self._path = path
        self._fileno: int = Libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._watched = self._watch = -1
        self._look()

    def fileno(self) -> int:
        """When it is readable, `read` has something to give."""
        return self._fileno

    def close(self) -> None:
        """Nothing is watched any more."""
        os.close(self._fileno)

    def read(self) -> list[str | None]:
        """Names of files that are new or changed; None: there may be any."""
        try:
            told = os.read(self._fileno, _ROOM)
        except BlockingIOError:
            return []
        names: list[str | None] = []
        for mask, name in _events(told):
            moved = mask & (_IN_DELETE_SELF | _IN_MOVE_SELF | _IN_Q_OVERFLOW | _IN_IGNORED)
            if moved or self._is_there:
                names.append(None if moved else name)
            elif name == self._path.parts[self._watched]:
                names.append(None)  # it has come, or a directory on the way to it
        if None in names:
            self._look()
            return [None]
        return list(dict.fromkeys(names))

    @property
    def _is_there(self) -> bool:
        return self._watched == len(self._path.parts)

    def _look(self) -> None:
        """The directory is watched, or as much of the way there as exists."""
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
            count += 1  # it came before its parent was watched


def _events(told: bytes) -> Iterator[tuple[int, str]]:
    at = 0
    while at < len(told):
        _, mask, _, length = _EVENT.unpack_from(told, at)
        at += _EVENT.size
        yield mask, os.fsdecode(told[at : at + length].rstrip(b"\0"))
        at += length
