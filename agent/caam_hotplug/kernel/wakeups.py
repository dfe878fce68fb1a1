"""Whether the machine has slept: without a bus, and without a timer that ever fires.

There are three signs, since none shows every sleep on every kernel:

- A resume counts as a change of the clock (timekeeping_resume in kernel/time/timekeeping.c), at
  which a timer can end (TFD_TIMER_CANCEL_ON_SET in timerfd_create(2)). Where the clock goes on, as
  on a processor without an idle driver, it does not.
- A thread that waits in epoll_wait(2) gets EINTR when it was frozen (signal(7)). Linux before 6.1
  lets it sleep on (freezable_schedule_hrtimeout_range in fs/eventpoll.c).
- The number of sleeps, for who looks at it.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import threading
import time
from contextlib import suppress
from ctypes import Structure, byref, c_long, create_string_buffer, sizeof
from pathlib import Path
from typing import Final

from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc

SLEEPS: Final = Path("/sys/power/suspend_stats/success")
_TIMER: Final = "the timer for changes of the clock"
_ABSOLUTE, _CANCEL_ON_SET = 0x1, 0x2
_FAR_S: Final = 300_000_000
"""Nine years."""
_LATEST_S: Final = (1 << 8 * sizeof(c_long) - 1) - 1
"""What the C library's function takes: 2038 where a long has 32 bits."""


class _Time(Structure):
    _fields_ = (("seconds", c_long), ("nanoseconds", c_long))


class _Alarm(Structure):
    """struct itimerspec."""

    _fields_ = (("every", _Time), ("at", _Time))


class Wakeups:
    """Readable after a sleep; also after other changes of the clock, and when it was stopped.

    Synchronization: loop only.
    """

    def __init__(self, sleeps: Path = SLEEPS) -> None:
        """Raises: KernelError, OSError if there can be no timer."""
        with reported_as("make", _TIMER):
            flags = os.O_CLOEXEC | os.O_NONBLOCK
            self._timer: int = Libc.timerfd_create(time.CLOCK_REALTIME, flags)
        self._sleeps = -1
        with suppress(OSError):  # a kernel that cannot sleep has no such file
            self._sleeps = os.open(sleeps, os.O_RDONLY | os.O_CLOEXEC)
        self._count = self._counted()
        self._arm()
        self._thaws = _Thaws()
        self._either = select.epoll()
        for each in (self._timer, self._thaws.seen):
            self._either.register(each, select.EPOLLIN)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `read` has something."""
        return self._either.fileno()

    def close(self) -> None:
        """Notice no more sleeps."""
        self._either.close()
        self._thaws.close()
        os.close(self._timer)
        if self._sleeps >= 0:
            os.close(self._sleeps)

    def read(self) -> bool:
        """Whether there was a sign of a sleep since the last call."""
        is_thawed, is_clock_changed = self._thaws.read(), self._read_timer()
        if is_thawed or is_clock_changed:
            self._count = self._counted()
        return is_thawed or is_clock_changed

    def counts_another(self) -> bool:
        """Whether there was a sleep that showed in nothing else."""
        before, self._count = self._count, self._counted()
        return self._count != before

    def _read_timer(self) -> bool:
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        self._arm()
        return True

    def _counted(self) -> bytes:
        if self._sleeps < 0:
            return b""
        with suppress(OSError):
            return os.pread(self._sleeps, 32, 0)
        return self._count

    def _arm(self) -> None:
        now = int(time.time())
        # Zero ends the timer: one that is always due would never let the loop rest.
        at = min(now + _FAR_S, _LATEST_S) if now < _LATEST_S else 0
        far = _Alarm(_Time(0, 0), _Time(at, 0))
        with reported_as("set", _TIMER):
            Libc.timerfd_settime(self._timer, _ABSOLUTE | _CANCEL_ON_SET, byref(far), None)


class _Thaws:
    """A thread that waits for nothing, and notices when it was frozen meanwhile."""

    def __init__(self) -> None:
        self.seen = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._waiting = select.epoll()
        self._waiting.register(self._end, select.EPOLLIN)
        self._thread = threading.Thread(target=self._wait, name="thaws", daemon=True)
        with suppress(RuntimeError):  # no thread is left: the other signs remain
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        os.eventfd_write(self._end, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._waiting.close()
        os.close(self._end)
        os.close(self.seen)

    def read(self) -> bool:
        """Whether it was frozen since the last call."""
        try:
            return bool(os.eventfd_read(self.seen))
        except BlockingIOError:
            return False

    def _wait(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        room = create_string_buffer(16)  # struct epoll_event
        while True:
            try:
                Libc.epoll_wait(self._waiting.fileno(), room, 1, -1)
            except OSError as error:
                if error.errno == errno.EINTR:
                    os.eventfd_write(self.seen, 1)
                    continue
            return
