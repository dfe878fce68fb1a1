"""The running agent, as a program sees it over the bus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Final

import sdbus

from caam_hotplug import names
from caam_hotplug.dbus.connection import Connection, NoBusError, words
from caam_hotplug.dbus.volume_view import ShownVolume, chosen
from caam_hotplug.errors import HotplugError, shown

MANAGER: Final = (names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER)
OBJECTS: Final = (names.BUS_NAME, names.BUS_PATH, "org.freedesktop.DBus.ObjectManager")
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_FOR_EVER_US: Final = 2**63 - 1

_NOT_THERE = (sdbus.DbusServiceUnknownError, sdbus.DbusNameHasNoOwnerError)
_ENDED = (sdbus.DbusNoReplyError, sdbus.DbusDisconnectedError)
_NO_OBJECT = (sdbus.DbusUnknownObjectError, sdbus.DbusUnknownMethodError)


class NotRunningError(HotplugError):
    """There is no agent to ask, or no bus to ask it over."""


def run(what: str, work: Callable[[Remote], Coroutine[Any, Any, None]]) -> None:
    """The work has been done with the agent. Raises: NotRunningError; HotplugError if refused."""

    async def connected() -> None:
        try:
            connection = Connection()
        except NoBusError as error:
            raise NotRunningError(
                f"{what}: {error}; the agent may run all the same: systemctl status {names.PROGRAM}"
            ) from error
        try:
            await work(Remote(connection, what))
        finally:
            connection.close()

    asyncio.run(connected())


class Remote:
    """The agent, asked for one command."""

    def __init__(self, connection: Connection, what: str) -> None:
        """`what`: the command, which errors begin with."""
        self.connection = connection
        self.what = what

    async def volumes(self) -> list[ShownVolume]:
        """All volumes, in the order in which they came."""
        return sorted((await self._by_path()).values(), key=lambda v: (v.diskseq, v.partition))

    async def manager(self) -> dict[str, Any]:
        """The manager's properties by their names."""
        target = (names.BUS_NAME, names.BUS_PATH, PROPERTIES)
        told = await self._call(self.what, target, "GetAll", "s", names.BUS_MANAGER)
        return {name: value for name, (_, value) in told.items()}

    async def volume(self, text: str) -> RemoteVolume:
        """The volume that is meant. Raises: HotplugError if it is none, or not one alone."""
        by_path = await self._by_path()
        path = chosen(text, by_path, self.what)
        return RemoteVolume(path, by_path[path].called)

    async def again(self, volume: RemoteVolume) -> ShownVolume:
        """What the agent says of the volume now."""
        target = (names.BUS_NAME, volume.path, PROPERTIES)
        subject = f"{self.what} {volume.called}"
        told = await self._call(subject, target, "GetAll", "s", names.BUS_VOLUME)
        return ShownVolume.from_properties({name: value for name, (_, value) in told.items()})

    async def change(self, volume: RemoteVolume, method: str, *arguments: Any) -> Any:
        """The method's result; it takes as long as the medium needs."""
        self.connection.bus.method_call_timeout_usec = _FOR_EVER_US
        target = (names.BUS_NAME, volume.path, names.BUS_VOLUME)
        return await self._call(f"{self.what} {volume.called}", target, method, *arguments)

    async def reload(self, within_s: float | None = None) -> list[str]:
        """What the agent notes about its new configuration.

        Raises: NotRunningError if it has said nothing within that time, if one is given.
        """
        patience_us = _FOR_EVER_US if within_s is None else int(within_s * 1_000_000)
        self.connection.bus.method_call_timeout_usec = patience_us
        return list(await self._call(self.what, MANAGER, "Reload"))

    async def _by_path(self) -> dict[str, ShownVolume]:
        return volumes_of(await self._call(self.what, OBJECTS, "GetManagedObjects"))

    async def _call(
        self, subject: str, target: tuple[str, str, str], member: str, *arguments: Any
    ) -> Any:
        reply = asyncio.ensure_future(self.connection.call(target, member, *arguments))
        lost = asyncio.ensure_future(self.connection.lost.wait())
        try:
            await asyncio.wait({reply, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not reply.done():
                raise NotRunningError(f"{subject}: the bus has gone")
            return reply.result()
        except sdbus.SdBusBaseError as error:
            raise in_words(error, subject) from error
        finally:
            reply.cancel()
            lost.cancel()


class RemoteVolume:
    """A volume of the agent's."""

    def __init__(self, path: str, called: str) -> None:
        self.path = path
        self.called = called


def volumes_of(objects: dict[str, dict[str, dict[str, tuple[str, Any]]]]) -> dict[str, ShownVolume]:
    """The volumes by their paths. `objects`: what GetManagedObjects tells."""
    return {
        path: ShownVolume.from_properties(
            {name: value for name, (_, value) in interfaces[names.BUS_VOLUME].items()}
        )
        for path, interfaces in objects.items()
        if names.BUS_VOLUME in interfaces
    }


def in_words(error: sdbus.SdBusBaseError, subject: str) -> HotplugError:
    """The error as a command tells it: operation, subject, cause, and what to do."""
    match error:
        case _ if isinstance(error, _NOT_THERE):
            return NotRunningError(
                f"{subject}: the agent does not run, or is not on the bus; "
                f"systemctl status {names.PROGRAM}"
            )
        case _ if isinstance(error, _ENDED):
            return NotRunningError(
                f"{subject}: the agent ended, or said nothing; journalctl -u {names.PROGRAM}"
            )
        case _ if isinstance(error, _NO_OBJECT):
            return HotplugError(f"{subject}: the volume is not there any more")
        case sdbus.DbusAccessDeniedError():
            return HotplugError(
                f"{subject}: only root and members of group {names.OPERATORS} may ask for it; "
                "use sudo, or have root add you to the group"
            )
        case _ if str(error.args[0]).startswith(names.BUS_ERROR_PREFIX):
            text = "\n".join(shown(line) for line in words(error).split("\n"))
            operation = subject.split(" ", 1)[0]
            return HotplugError(text if text.startswith(operation) else f"{subject}: {text}")
        case _:
            return HotplugError(f"{subject}: {shown(words(error))}")
