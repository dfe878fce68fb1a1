"""Telling the service manager how we are: one datagram a message (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Notifier:
    """Speaks to whoever started us with NOTIFY_SOCKET; to nobody without it."""

    def __init__(self) -> None:
        self._address = os.environ.pop("NOTIFY_SOCKET", "")
        watchdog_us = os.environ.pop("WATCHDOG_USEC", "")
        for_us = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        usable = for_us and watchdog_us.isdecimal() and int(watchdog_us) > 0
        self.watchdog_s = int(watchdog_us) / 1e6 if usable else None
        """How long we may be silent, in seconds, or None if nobody watches."""

    def tell(self, *assignments: str) -> None:
        """The service manager knows, such as `READY=1`; a manager that is gone, or
        for which there is no file descriptor left, is no error."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address[0] == "@" else self._address
        kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
            sender.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT, address)
