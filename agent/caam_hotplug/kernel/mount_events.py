"""Changes of the mounts, as the kernel reports them: nobody asks again and again.

The kernel reports a change of the namespace's mounts as POLLPRI on mountinfo, once for each open
file (proc_pid_mountinfo(5), mounts_poll in fs/proc_namespace.c). The loop can only wait until
something is readable, which mountinfo always is. So mountinfo is in an epoll instance of its own,
which is readable itself while there is something to report (epoll(7)).
"""

from __future__ import annotations

import os
import select
from typing import Final

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel.ctypes_lib import reported_as

_MOUNTINFO: Final = "/proc/self/mountinfo"


class MountEvents:
    """Readable when the mounts of this process's namespace may have changed. Loop only."""

    def __init__(self) -> None:
        """Raises: UnknownError if the kernel does not report changes."""
        with reported_as("watch", _MOUNTINFO, UnknownError):
            self._file = os.open(_MOUNTINFO, os.O_RDONLY | os.O_CLOEXEC)
            try:
                self._events = select.epoll()
                self._events.register(self._file, select.EPOLLPRI | select.EPOLLET)
            except OSError:
                os.close(self._file)
                raise
        self.read()  # what was before does not count

    def fileno(self) -> int:
        """Return the descriptor that is readable after a change."""
        return self._events.fileno()

    def read(self) -> None:
        """Take note of all changes so far; what is read of the mounts from now on has them.

        There may be none to take: an epoll instance that waits for this one has asked the kernel
        already, which reports each change once (ep_eventpoll_poll in fs/eventpoll.c).
        """
        self._events.poll(0)

    def close(self) -> None:
        """Watch no more."""
        self._events.close()
        os.close(self._file)
