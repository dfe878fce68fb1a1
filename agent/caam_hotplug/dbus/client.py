"""A client of the running agent, over the bus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any, Final

import sdbus

from caam_hotplug import names
from caam_hotplug.dbus.connection import Connection, NoBusError, error_message
from caam_hotplug.dbus.volume_view import ShownVolume, select
from caam_hotplug.errors import HotplugError, shown

MANAGER: Final = (names.BUS_NAME, names.BUS_PATH, names.BUS_MANAGER)
OBJECTS: Final = (names.BUS_NAME, names.BUS_PATH, "org.freedesktop.DBus.ObjectManager")
PROPERTIES: Final = "org.freedesktop.DBus.Properties"
_NO_TIME_LIMIT_US: Final = 2**63 - 1
_LOOK_TAKES_S: Final = 0.05
_LOOKS_MOST: Final = 10
_EXPLAIN_WITHIN_US: Final = 90_000_000
"""More than the agent gives itself."""

_NOT_RUNNING = (sdbus.DbusServiceUnknownError, sdbus.DbusNameHasNoOwnerError)
_ENDED = (sdbus.DbusNoReplyError, sdbus.DbusDisconnectedError)
_NO_OBJECT = (sdbus.DbusUnknownObjectError, sdbus.DbusUnknownMethodError)


class NotRunningError(HotplugError):
    """No agent answers, or there is no bus."""


def run(what: str, work: Callable[[Remote], Coroutine[Any, Any, None]]) -> None:
    """Do the work with the running agent.

    Raises: NotRunningError; HotplugError if the agent refuses it.
    """

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
    """The running agent, as one command sees it."""

    def __init__(self, connection: Connection, what: str) -> None:
        """`what`: the command, with which errors begin."""
        self.connection = connection
        self.what = what

    async def volumes(self) -> list[ShownVolume]:
        """Return all volumes in the order of their arrival."""
        return sorted((await self._by_path()).values(), key=lambda v: (v.diskseq, v.partition))

    async def looked_at_volumes(self) -> list[ShownVolume]:
        """Return all volumes, as the agent sees them by the check that a read causes.

        A volume that it cannot check soon is as of the check before.
        """
        begun_us = time.time_ns() // 1000
        volumes = await self.volumes()
        for _ in range(_LOOKS_MOST):
            if not any(volume.may_be_out_of_date(begun_us) for volume in volumes):
                break
            await asyncio.sleep(_LOOK_TAKES_S)
            volumes = await self.volumes()
        return volumes

    async def manager(self) -> dict[str, Any]:
        """Return the manager's properties by their names."""
        target = (names.BUS_NAME, names.BUS_PATH, PROPERTIES)
        reply = await self._call(self.what, target, "GetAll", "s", names.BUS_MANAGER)
        return {name: value for name, (_, value) in reply.items()}

    async def volume(self, text: str) -> RemoteVolume:
        """Return the volume that the text names.

        Raises: HotplugError if the text names none, or more than one.
        """
        by_path = await self._by_path()
        path = select(text, by_path, self.what)
        return RemoteVolume(path, by_path[path].display_name)

    async def read(self, volume: RemoteVolume) -> ShownVolume:
        """Return the volume's current properties."""
        target = (names.BUS_NAME, volume.path, PROPERTIES)
        subject = f"{self.what} {volume.display_name}"
        reply = await self._call(subject, target, "GetAll", "s", names.BUS_VOLUME)
        return ShownVolume.from_properties({name: value for name, (_, value) in reply.items()})

    async def change(self, volume: RemoteVolume, method: str, *arguments: Any) -> Any:
        """Return the method's result. There is no time limit, since a medium may be slow."""
        self.connection.bus.method_call_timeout_usec = _NO_TIME_LIMIT_US
        target = (names.BUS_NAME, volume.path, names.BUS_VOLUME)
        return await self._call(f"{self.what} {volume.display_name}", target, method, *arguments)

    async def explain(self, device: str) -> str:
        """Return what the agent says of the device, which may take it a while."""
        self.connection.bus.method_call_timeout_usec = _EXPLAIN_WITHIN_US
        return str(await self._call(self.what, MANAGER, "Explain", "s", device))

    async def reload(self, within_s: float | None = None) -> list[str]:
        """Make the agent read its configuration again, and return its notices.

        Raises: NotRunningError if it does not answer within that time, if one is given.
        """
        limit_us = _NO_TIME_LIMIT_US if within_s is None else int(within_s * 1_000_000)
        self.connection.bus.method_call_timeout_usec = limit_us
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
            raise command_error(error, subject) from error
        finally:
            reply.cancel()
            lost.cancel()


class RemoteVolume:
    """A volume of the running agent."""

    def __init__(self, path: str, display_name: str) -> None:
        self.path = path
        self.display_name = display_name


def volumes_of(objects: dict[str, dict[str, dict[str, tuple[str, Any]]]]) -> dict[str, ShownVolume]:
    """Return the volumes by their paths. `objects`: the reply of GetManagedObjects."""
    return {
        path: ShownVolume.from_properties(
            {name: value for name, (_, value) in interfaces[names.BUS_VOLUME].items()}
        )
        for path, interfaces in objects.items()
        if names.BUS_VOLUME in interfaces
    }


def command_error(error: sdbus.SdBusBaseError, subject: str) -> HotplugError:
    """Return the error as a command reports it: operation, subject, cause, and what to do."""
    match error:
        case _ if isinstance(error, _NOT_RUNNING):
            return NotRunningError(
                f"{subject}: the agent does not run, or is not on the bus; "
                f"systemctl status {names.PROGRAM}"
            )
        case _ if isinstance(error, _ENDED):
            return NotRunningError(
                f"{subject}: the agent ended or did not answer; journalctl -u {names.PROGRAM}"
            )
        case _ if isinstance(error, _NO_OBJECT):
            return HotplugError(f"{subject}: the volume has gone")
        case sdbus.DbusAccessDeniedError():
            return HotplugError(
                f"{subject}: only root and members of group {names.OPERATORS} may request it; "
                "use sudo, or have root add you to the group"
            )
        case _ if str(error.args[0]).startswith(names.BUS_ERROR_PREFIX):
            text = "\n".join(shown(line) for line in error_message(error).split("\n"))
            operation = subject.split(" ", 1)[0]
            return HotplugError(text if text.startswith(operation) else f"{subject}: {text}")
        case _:
            return HotplugError(f"{subject}: {shown(error_message(error))}")
