"""Errors that filesystems meet, as the kernel reports them: from Linux 5.16 on, and by ext4 only.

An event says no more than that there was one. What it means is read elsewhere.
Source: fanotify(7), FAN_FS_ERROR; fsnotify_sb_error in include/linux/fsnotify.h.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc

_FAN_CLOEXEC_NONBLOCK: Final = 0x1 | 0x2
_FAN_REPORT_FID: Final = 0x200
_FAN_MARK_ADD_FILESYSTEM: Final = 0x1 | 0x100
_FAN_FS_ERROR: Final = 0x8000
_ROOM: Final = 4096


class FilesystemErrors:
    """Readable after an error of a filesystem that was added. Any thread may add one."""

    def __init__(self) -> None:
        self._events = -1

    def begin(self) -> None:
        """Report errors from now on. Raises: KernelError if this kernel does not."""
        with reported_as("watch for errors of", "filesystems", KernelError):
            flags = _FAN_CLOEXEC_NONBLOCK | _FAN_REPORT_FID
            self._events = Libc.fanotify_init(flags, os.O_RDONLY | os.O_CLOEXEC)

    def add(self, directory: int, name: str) -> None:
        """Report errors of the filesystem at the name, until that has gone. It stays unpinned.

        One whose kind reports none is left out.
        """
        if self._events >= 0:
            with suppress(OSError):
                path = os.fsencode(name)
                mark, mask = _FAN_MARK_ADD_FILESYSTEM, _FAN_FS_ERROR
                Libc.fanotify_mark(self._events, mark, mask, directory, path)

    def fileno(self) -> int:
        """Return the descriptor that is readable after an error."""
        return self._events

    def read(self) -> None:
        """Take all events so far."""
        with suppress(BlockingIOError):
            while os.read(self._events, _ROOM):
                pass

    def close(self) -> None:
        """Report nothing more."""
        events, self._events = self._events, -1
        if events >= 0:
            os.close(events)
