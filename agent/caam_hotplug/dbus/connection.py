"""A connection to the system bus, and the news that it has ended."""

from __future__ import annotations

import asyncio
import os
import re
import socket
from typing import Any

import sdbus

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


def words(error: sdbus.SdBusBaseError) -> str:
    """What the error says, with the system's words where sdbus has only a number."""
    text = str(error.args[-1]) if error.args else type(error).__name__
    found = _ERRNO.search(text)
    return os.strerror(int(found[1])) if found else text


class Connection:
    """The bus, for one event loop. Synchronization: loop only."""

    def __init__(self) -> None:
        """Raises: NoBusError if there is nothing to connect to."""
        try:
            self.bus = sdbus.sd_bus_open_system()
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"connect to the system bus: {words(error)}") from error
        self.lost = asyncio.Event()
        """Set once the bus has closed the connection."""
        self._loop = asyncio.get_running_loop()
        # sdbus takes its reader away and tells nobody. A descriptor of our own can be asked.
        self._ear = socket.socket(fileno=os.dup(self.bus.get_fd()))
        self._loop.add_reader(self._ear, self._listen)

    async def greet(self) -> None:
        """The bus has answered. Raises: NoBusError if it does not, or lets nobody in."""
        try:
            await self.call(BUS, "GetId")
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"talk to the system bus: {words(error)}") from error

    async def own(self, name: str) -> None:
        """The name is ours. Raises: NoBusError if the bus gives it to nobody or has given it."""
        try:
            await self.bus.request_name_async(name, 0)
        except SdBusRequestNameExistsError as error:
            raise NoBusError(f"own {name} on the system bus: another process has it") from error
        except sdbus.SdBusBaseError as error:
            raise NoBusError(f"own {name} on the system bus: {words(error)}") from error

    def close(self) -> None:
        """The connection has ended."""
        self._loop.remove_reader(self._ear)
        self._ear.close()
        self.bus.close()
        # Its end takes the reader of its descriptor away once more (SdBus_dealloc), whoever has
        # that number by then. So it ends here.
        del self.bus

    async def call(
        self, target: tuple[str, str, str], member: str, signature: str = "", *arguments: Any
    ) -> Any:
        """The method's result. `target`: name, object and interface.

        Raises: sdbus.SdBusBaseError with the error's D-Bus name and message.
        """
        return (await self.begin(target, member, signature, *arguments)).get_contents()

    def begin(
        self, target: tuple[str, str, str], member: str, signature: str = "", *arguments: Any
    ) -> asyncio.Future[SdBusMessage]:
        """The future reply of the method, which has been called.

        Whoever drops the future drops the call: nobody else holds it.
        """
        message = self.bus.new_method_call_message(*target, member)
        if signature:
            message.append_data(signature, *arguments)
        return self.bus.call_async(message)

    def _listen(self) -> None:
        try:
            ended = not self._ear.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError:
            ended = True
        if ended:
            self._loop.remove_reader(self._ear)
            self.lost.set()
