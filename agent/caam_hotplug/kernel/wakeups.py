"""Whether the machine has slept: without a bus, and without a timer that ever fires.

A resume counts as a change of the clock (timekeeping_resume in kernel/time/timekeeping.c), at which
a timer can end (TFD_TIMER_CANCEL_ON_SET in timerfd_create(2)). A sleep that leaves the clock
running, as on a processor without an idle driver, only shows in the number of sleeps.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from ctypes import Structure, byref, c_long
from pathlib import Path
from typing import Final

from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc

SLEEPS: Final = Path("/sys/power/suspend_stats/success")
_TIMER: Final = "the timer for changes of the clock"
_ABSOLUTE, _CANCEL_ON_SET = 0x1, 0x2
_FAR_S: Final = 300_000_000
"""Nine years, so that the time fits 32 bits where a long has no more."""


class _Time(Structure):
    _fields_ = (("seconds", c_long), ("nanoseconds", c_long))


class _Alarm(Structure):
    """struct itimerspec."""

    _fields_ = (("every", _Time), ("at", _Time))


class Wakeups:
    """Readable after a sleep, and after other changes of the clock. Synchronization: loop only."""

    def __init__(self, sleeps: Path = SLEEPS) -> None:
        """Raises: KernelError if there can be no timer."""
        with reported_as("make", _TIMER):
            flags = os.O_CLOEXEC | os.O_NONBLOCK
            self._timer: int = Libc.timerfd_create(time.CLOCK_REALTIME, flags)
        self._sleeps = -1
        with suppress(OSError):  # a kernel that cannot sleep has no such file
            self._sleeps = os.open(sleeps, os.O_RDONLY | os.O_CLOEXEC)
        self._count = self._counted()
        self._arm()

    def fileno(self) -> int:
        """Return the descriptor that is readable when `read` has something."""
        return self._timer

    def close(self) -> None:
        """Notice no more sleeps."""
        os.close(self._timer)
        if self._sleeps >= 0:
            os.close(self._sleeps)

    def read(self) -> bool:
        """Whether the clock was changed since the last call, as every resume does."""
        try:
            os.read(self._timer, 8)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno != errno.ECANCELED:
                raise
        self._count = self._counted()
        self._arm()
        return True

    def counts_another(self) -> bool:
        """Whether there was a sleep that left the clock running."""
        before, self._count = self._count, self._counted()
        return self._count != before

    def _counted(self) -> bytes:
        if self._sleeps < 0:
            return b""
        with suppress(OSError):
            return os.pread(self._sleeps, 32, 0)
        return self._count

    def _arm(self) -> None:
        far = _Alarm(_Time(0, 0), _Time(int(time.time()) + _FAR_S, 0))
        with reported_as("set", _TIMER):
            Libc.timerfd_settime(self._timer, _ABSOLUTE | _CANCEL_ON_SET, byref(far), None)
