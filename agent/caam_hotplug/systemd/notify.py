"""Notifications to the service manager: one datagram for each message (sd_notify(3))."""

from __future__ import annotations

import os
import socket
import weakref
from contextlib import suppress


class Notifier:
    """Sends to the socket that NOTIFY_SOCKET names; without the variable it sends nothing."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        is_ours = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usable = is_ours and watchdog_us.isdecimal() and int(watchdog_us) > 0
        self.watchdog_s = int(watchdog_us) / 1e6 if usable else None
        """Longest time between two pings of the watchdog, or None without a watchdog."""
        # Kept open: at the limit of open files, the watchdog would end an agent that works.
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        weakref.finalize(self, self._socket.close)

    def send(self, *assignments: str) -> None:
        """Send the assignments, such as `READY=1`. A service manager that is gone is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        with suppress(OSError):
            self._socket.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT, address)
