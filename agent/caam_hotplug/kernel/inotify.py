"""New and changed files of a directory (inotify(7)), also of one that does not exist yet.

The directory is watched, and so is each one above it, for the next name on the path. One of them
may be moved away, and another put in its place; or one may be deleted that a program still has open
as its own, of which the kernel says nothing until that closes it (d_delete in fs/dcache.c).
"""

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

_IN_ATTRIB, _IN_CLOSE_WRITE, _IN_MOVED_TO, _IN_CREATE = 0x4, 0x8, 0x80, 0x100
_IN_MOVED_FROM, _IN_DELETE, _IN_DELETE_SELF, _IN_MOVE_SELF = 0x40, 0x200, 0x400, 0x800
_IN_UNMOUNT, _IN_Q_OVERFLOW, _IN_IGNORED = 0x2000, 0x4000, 0x8000
_IN_ONLYDIR: Final = 0x1000000
_ON_PATH: Final = _IN_CREATE | _IN_MOVED_TO | _IN_ATTRIB | _IN_DELETE_SELF | _IN_MOVE_SELF
_REMOVALS: Final = _IN_DELETE | _IN_MOVED_FROM
_OF_ITSELF: Final = _IN_DELETE_SELF | _IN_MOVE_SELF | _IN_UNMOUNT | _IN_IGNORED
_EVENT: Final = struct.Struct("iIII")
"""struct inotify_event without its name: watch, mask, cookie, length of the name."""
_ROOM: Final = 64 << 10
_CURES: Final = {
    errno.ENOSPC: "raise the sysctl fs.inotify.max_user_watches",
    errno.EMFILE: "raise the sysctl fs.inotify.max_user_instances, or LimitNOFILE= of the service",
}
"""Source: inotify_add_watch(2), inotify_init1(2)."""


class Directory:
    """A directory under watch. Synchronization: loop only."""

    def __init__(self, path: Path, *, removals: bool = False) -> None:
        """`removals`: files that go are reported, too, also one in the place of the directory.

        Raises: UnknownError if the kernel has no watch left, with the cure.
        """
        self._path = path
        names = path.parts
        self._on_path = [os.path.join(*names[: n + 1]) for n in range(len(names))]  # noqa: PTH118
        self._removals = _REMOVALS if removals else 0
        self._watches: list[int] = []
        """The kernel's numbers of the watches on the path, from the root on; 0 without one."""
        with reported_as("watch", str(path), _not_watched):
            self._fileno: int = Libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                self._walk()
            except BaseException:
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

        Raises: UnknownError if the path leads elsewhere and that cannot be watched. It is watched
        no more then.
        """
        try:
            events = os.read(self._fileno, _ROOM)
        except BlockingIOError:
            return []
        names = [name for event in _parsed(events) for name in self._noted(*event)]
        if None in names:
            self.leads_elsewhere()
            return [None]
        return list(dict.fromkeys(names))

    def leads_elsewhere(self) -> bool:
        """Watch what is at the path now, and return whether it is not what was there before.

        A mount over a directory on the path sends no event. Raises: as `read`.
        """
        before = self._watches
        with reported_as("watch", str(self._path), _not_watched):
            self._walk()
        return self._watches != before

    def _noted(self, watch: int, mask: int, name: str) -> Iterator[str | None]:
        """Yield the name of a file, or None if the path may lead elsewhere."""
        if mask & _IN_Q_OVERFLOW:
            yield None
        for depth, known in enumerate(self._watches):
            if known != watch:
                continue
            is_last = depth == len(self._on_path) - 1
            if mask & _OF_ITSELF or not name:  # without a name: its owner or mode has changed
                yield None
            elif is_last:
                yield name
            elif name == self._path.parts[depth + 1]:
                yield None

    def _walk(self) -> None:
        """Watch every directory on the path, as far as there are any. Raises: OSError.

        From the root on: what is made meanwhile is found, or reported by the one above it.
        """
        watches: list[int] = []
        for at in self._on_path:
            of_files = _IN_CLOSE_WRITE if at is self._on_path[-1] else 0
            removals = self._removals if at in self._on_path[-2:] else 0
            mask = _ON_PATH | of_files | removals | _IN_ONLYDIR
            try:
                watches.append(Libc.inotify_add_watch(self._fileno, os.fsencode(at), mask))
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ELOOP}:
                    raise
                watches.append(0)
        before, self._watches = self._watches, watches
        for gone in {*before} - {*watches, 0}:
            with suppress(OSError):  # EINVAL: the watch went with its directory
                Libc.inotify_rm_watch(self._fileno, gone)


def _not_watched(operation: str, path: str, number: int) -> UnknownError:
    return UnknownError(operation, path, number, _CURES.get(number, ""))


def _parsed(events: bytes) -> Iterator[tuple[int, int, str]]:
    """Yield the watch, mask and name of each event."""
    at = 0
    while at < len(events):
        watch, mask, _, length = _EVENT.unpack_from(events, at)
        at += _EVENT.size
        yield watch, mask, os.fsdecode(events[at : at + length].rstrip(b"\0"))
        at += length
