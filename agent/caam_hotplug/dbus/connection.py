"""A connection to the system bus that reports its own end."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from typing import Any

import sdbus

from caam_hotplug.dbus.relay import CLIENTS, Limits, Relay
from caam_hotplug.dbus.sdbus_internals import SdBusMessage, SdBusRequestNameExistsError
from caam_hotplug.errors import HotplugError

BUS: tuple[str, str, str] = (
    "org.freedesktop.DBus",
    "/org/freedesktop/DBus",
    "org.freedesktop.DBus",
)
"""The bus itself: its name, object and interface."""

_ERRNO = re.compile(r"error number: (\d+)$")


class NoBusError(HotplugError):
    """There is no bus, or it does not answer."""


def error_message(error: sdbus.SdBusBaseError) -> str:
    """Return the error's message, with the text of errno where sdbus has only the number."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    found = _ERRNO.search(text)
    return os.strerror(int(found[1])) if found else text


class Connection:
    """The bus, for one event loop. Synchronization: loop only."""

    def __init__(self, limits: Limits = CLIENTS, is_at_work: Callable[[], bool] = bool) -> None:
        """`limits`, `is_at_work`: as in Relay. Raises: NoBusError without a bus to connect to."""
        try:
            self.bus = sdbus.sd_bus_open_system()
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"connect to the system bus: {error_message(error)}") from error
        self.lost = asyncio.Event()
        """Set once the bus has closed the connection."""
        bus, lost = self.bus, self.lost.set
        try:
            self._relay = Relay(bus.get_fd(), bus.process, lost, limits, is_at_work)
        except OSError as error:  # at the limit of open files
            bus.close()
            raise NoBusError(f"connect to the system bus: {error.strerror}") from error

    def flush(self) -> None:
        """Send what was written, now and not in the loop's next turn."""
        self._relay.flush()

    async def ping(self) -> None:
        """Wait until the bus answers. Raises: NoBusError if it refuses the connection."""
        try:
            await self.call(BUS, "GetId")
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"talk to the system bus: {error_message(error)}") from error

    async def own(self, name: str) -> None:
        """Acquire the name. Raises: NoBusError if the bus refuses it or another process has it."""
        try:
            await self.bus.request_name_async(name, 0)
        except SdBusRequestNameExistsError as error:
            raise NoBusError(f"own {name} on the system bus: another process has it") from error
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"own {name} on the system bus: {error_message(error)}") from error

    def close(self) -> None:
        """Close the connection."""
        self._relay.close()
        del self._relay  # which has a method of the bus
        self.bus.close()
        # When the object is freed, sdbus removes the reader of its descriptor's number once more
        # (SdBus_dealloc). Another file may have that number later, so the object is freed now.
        del self.bus

    async def call(
        self, target: tuple[str, str, str], member: str, signature: str = "", *arguments: Any
    ) -> Any:
        """Return the method's result. `target`: name, object and interface.

        Raises: sdbus.SdBusBaseError with the error's D-Bus name and message.
        """
        return (await self.begin(target, member, signature, *arguments)).get_contents()

    def begin(
        self, target: tuple[str, str, str], member: str, signature: str = "", *arguments: Any
    ) -> asyncio.Future[SdBusMessage]:
        """Call the method and return the future reply.

        Only the future holds the call, so dropping it cancels the call.
        """
        message = self.bus.new_method_call_message(*target, member)
        if signature:
            message.append_data(signature, *arguments)
        return self.bus.call_async(message)
