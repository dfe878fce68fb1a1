"""A relay between the bus and sdbus, so that no flood of messages takes the loop or the memory.

sdbus handles all messages that its socket has before it returns to the loop (SdBus_process in
sd_bus_internals_bus.c). While others send faster than that, it does not return. So its socket is
one end of a pair. The relay has the other end, and the bus: sdbus gets one message at a time.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import sdbus

from caam_hotplug.dbus import wire

log = logging.getLogger(__name__)

_READ_AT_ONCE: Final = 64 << 10
_DROPPED_AT_ONCE: Final = 32
_PAUSE_S: Final = 0.1
"""Between two messages while a medium is served."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What all senders together may take of this process."""

    message_bytes: int
    """A larger message is dropped."""
    share: float
    """Part of a processor's time for what comes, in the long run."""
    burst_s: float
    """A processor's time that may be taken at once."""
    is_agent: bool
    """Whether to drop what an agent need not read; see `wire.is_of_use`."""


AGENTS: Final = Limits(message_bytes=128 << 10, share=0.1, burst_s=0.1, is_agent=True)
"""Any user may send to the agent. No request that it answers is nearly as large."""
OF_UNITS: Final = Limits(message_bytes=128 << 10, share=0.1, burst_s=1, is_agent=False)
"""A connection to systemd. Its signals are of use, and any user may send others to it."""
CLIENTS: Final = Limits(message_bytes=1 << 28, share=1, burst_s=1, is_agent=False)
"""A client has nothing else to do than to read. D-Bus has no larger message."""


class Relay:
    """Passes on what comes and goes. Synchronization: loop only."""

    def __init__(
        self,
        descriptor: int,
        process: Callable[[], None],
        ended: Callable[[], None],
        limits: Limits,
        is_at_work: Callable[[], bool] = bool,
    ) -> None:
        """Put itself between the descriptor, which is connected, and the bus.

        `process` handles what the descriptor has; `ended` is called when the bus has closed.
        `is_at_work`: whether a medium is served now. It goes before requests; by default, none is.
        Raises: OSError.
        """
        self._process = process
        self._ended = ended
        self._limits = limits
        self._is_at_work = is_at_work
        self._loop = asyncio.get_running_loop()
        self._bus = socket.socket(fileno=os.dup(descriptor))
        try:
            self._inner, theirs = socket.socketpair()
        except OSError:
            self._bus.close()
            raise
        with theirs:
            os.dup2(theirs.fileno(), descriptor, inheritable=False)
        for end in (self._bus, self._inner):
            end.setblocking(False)
        self._came = bytearray()
        self._to_drop = 0
        """How much of a message that is too large is still to come."""
        self._unsent = b""
        self._taken_s = 0.0
        """Processor time that counts against the burst."""
        self._taken_at = self._loop.time()
        self._next: asyncio.Handle | None = None
        self._is_large_logged = False
        self._loop.add_reader(self._bus, self._read)
        self._loop.add_reader(self._inner, self.flush)

    def close(self) -> None:
        """Send what the bus takes at once, and close."""
        self.flush()
        self._stop()
        self._loop.remove_reader(self._inner)
        self._inner.close()
        self._bus.close()

    def flush(self) -> None:
        """Send what sdbus has written. What the bus does not take yet waits, and so do requests."""
        try:
            may_be_more = True
            while self._unsent or (may_be_more and (came := self._inner.recv(_READ_AT_ONCE))):
                if not self._unsent:
                    self._unsent, may_be_more = came, len(came) == _READ_AT_ONCE
                self._unsent = self._unsent[self._bus.send(self._unsent) :]
        except BlockingIOError:
            if self._unsent:
                self._loop.remove_reader(self._inner)
                self._loop.add_writer(self._bus, self._send_more)
        except OSError:  # `_read` notices the end of the connection
            self._unsent = b""

    def _send_more(self) -> None:
        self._loop.remove_writer(self._bus)
        self._loop.add_reader(self._inner, self.flush)
        self.flush()
        if not self._unsent and self._next is None:
            self._pass_on()

    def _read(self) -> None:
        try:
            came = self._bus.recv(_READ_AT_ONCE)
        except BlockingIOError:
            return
        except OSError:
            came = b""
        self._came += came
        if came:
            self._pass_on()
        else:
            self._end()

    def _pass_on(self) -> None:
        """Have sdbus handle one message, and continue when there is time for another one."""
        self._next = None
        message: bytes | None = None
        took_s = 0.0
        try:
            if not self._unsent:
                message = self._take()
            if message:  # what is dropped takes little, and does not put off what is of use
                begun = time.thread_time()
                self._handle(message)
                took_s = time.thread_time() - begun
        except (OSError, wire.MalformedError, sdbus.SdBusLibraryError) as error:
            log.warning("the connection to the bus is given up: %s", error)
            self._end()
        else:
            self._continue(took_s, message)

    def _take(self) -> bytes | None:
        """Return the next message of use; b"" after many that are not, None if none is whole.

        Raises: wire.MalformedError.
        """
        for _ in range(_DROPPED_AT_ONCE):
            self._drop()
            length = wire.length(self._came)
            if length is None:
                return None
            if length > self._limits.message_bytes:
                self._note_large(length)
                self._to_drop = length
                continue
            if length > len(self._came):
                return None
            message = bytes(self._came[:length])
            del self._came[:length]
            if wire.is_of_use(message, to_agent=self._limits.is_agent):
                return message
        return b""

    def _drop(self) -> None:
        here = min(self._to_drop, len(self._came))
        del self._came[:here]
        self._to_drop -= here

    def _note_large(self, length: int) -> None:
        if not self._is_large_logged:
            self._is_large_logged = True
            log.warning("a message of %d bytes on the bus is dropped, and later ones are", length)

    def _handle(self, message: bytes) -> None:
        while message:
            message = message[self._inner.send(message) :]
            self._process()
        self.flush()

    def _continue(self, took_s: float, message: bytes | None) -> None:
        """Go on with the next message in a turn of its own, or read on; later, if it took long.

        `message` is what `_take` has returned.
        """
        now, limits = self._loop.time(), self._limits
        regained_s = (now - self._taken_at) * limits.share
        self._taken_s = max(0.0, self._taken_s - regained_s) + took_s
        self._taken_at = now
        delay_s = (self._taken_s - limits.burst_s) / limits.share
        if message is not None and not wire.is_awaited(message) and self._is_at_work():
            delay_s = max(delay_s, _PAUSE_S)
        if self._unsent:
            self._loop.remove_reader(self._bus)
        elif delay_s > 0:
            self._loop.remove_reader(self._bus)
            self._next = self._loop.call_later(delay_s, self._pass_on)
        elif message is not None:
            self._loop.remove_reader(self._bus)
            self._next = self._loop.call_soon(self._pass_on)
        else:
            self._loop.add_reader(self._bus, self._read)

    def _end(self) -> None:
        """Have sdbus notice the end, too."""
        self._stop()
        with suppress(OSError):
            self._inner.shutdown(socket.SHUT_WR)
        self._ended()

    def _stop(self) -> None:
        if self._next is not None:
            self._next.cancel()
        self._loop.remove_reader(self._bus)
        self._loop.remove_writer(self._bus)
