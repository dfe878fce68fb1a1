"""What is on the bus: the manager's object and one for every volume.

`config/org.caamhotplug1.xml` is the contract; a test compares it with what is exported here.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol

from sdbus import (
    DbusPropertyConstFlag,
    DbusPropertyEmitsChangeFlag,
    DbusUnprivilegedFlag,
    SdBusBaseError,
)

from caam_hotplug import __version__, errors, names
from caam_hotplug.dbus.authorization import Callers, apart
from caam_hotplug.dbus.connection import Connection, words
from caam_hotplug.dbus.sdbus_internals import SdBusInterface, SdBusMessage, stop_export
from caam_hotplug.errors import HotplugError, RequestRefusedError, VolumeBusyError, shown
from caam_hotplug.model import SECTOR_BYTES, Entry, State, VolumeId
from caam_hotplug.systemd import journal

log = logging.getLogger(__name__)

_U32: Final = 2**32 - 1
_U64: Final = 2**64 - 1
_EXPLAIN_WITHIN_S: Final = 60.0
_DEFECT: Final = "a defect of the agent; the journal has the details"


class Requests(Protocol):
    """Who does what is asked of a volume: the supervisor."""

    async def lock(self, volume: VolumeId, by: str) -> None: ...
    async def eject(self, volume: VolumeId, by: str, *, power_off: bool = True) -> str: ...
    async def unlock(self, volume: VolumeId, by: str) -> None: ...
    async def retry(self, volume: VolumeId, by: str) -> None: ...


class Agent(Protocol):
    """Who does what is asked of the agent as a whole."""

    async def reload(self, by: str) -> list[str]: ...

    def explain(self, device: str) -> str:
        """Synchronization: called in a thread of its own, since it may read from a sick medium."""
        ...


class StatusRegistry(Protocol):
    """What is true of the volumes."""

    counters: Counter[str]

    def entries(self) -> list[Entry]: ...


class ArgumentsError(HotplugError):
    """The arguments of a call have the right types and the wrong values."""


class NotPermittedError(HotplugError):
    """Whoever asked may look, but not ask for this."""


ERROR_NAMES: Final[Mapping[type[Exception], str]] = {
    ArgumentsError: "org.freedesktop.DBus.Error.InvalidArgs",
    NotPermittedError: "org.freedesktop.DBus.Error.AccessDenied",
    HotplugError: f"{names.BUS_ERROR_PREFIX}Failed",
    errors.ConfigError: f"{names.BUS_ERROR_PREFIX}Configuration",
    errors.UnsafePathError: f"{names.BUS_ERROR_PREFIX}UnsafePath",
    errors.UnfitFileError: f"{names.BUS_ERROR_PREFIX}UnfitFile",
    errors.UnsupportedVolumeError: f"{names.BUS_ERROR_PREFIX}UnsupportedVolume",
    errors.DeviceInUseError: f"{names.BUS_ERROR_PREFIX}DeviceInUse",
    errors.DeviceLockedError: f"{names.BUS_ERROR_PREFIX}DeviceLocked",
    errors.BlobError: f"{names.BUS_ERROR_PREFIX}Blob",
    errors.BlobMissingError: f"{names.BUS_ERROR_PREFIX}BlobMissing",
    errors.MasterKeyError: f"{names.BUS_ERROR_PREFIX}MasterKey",
    errors.BlobRejectedError: f"{names.BUS_ERROR_PREFIX}BlobRejected",
    errors.NoFilesystemError: f"{names.BUS_ERROR_PREFIX}NoFilesystem",
    errors.ReleaseError: f"{names.BUS_ERROR_PREFIX}Release",
    errors.RequestRefusedError: f"{names.BUS_ERROR_PREFIX}RequestRefused",
    errors.VolumeBusyError: f"{names.BUS_ERROR_PREFIX}VolumeBusy",
    errors.ForeignMappingError: f"{names.BUS_ERROR_PREFIX}ForeignMapping",
    errors.MountPointOccupiedError: f"{names.BUS_ERROR_PREFIX}MountPointOccupied",
    errors.KernelError: f"{names.BUS_ERROR_PREFIX}Kernel",
    errors.CaamError: f"{names.BUS_ERROR_PREFIX}Caam",
    errors.KeyringError: f"{names.BUS_ERROR_PREFIX}Keyring",
    errors.DmError: f"{names.BUS_ERROR_PREFIX}DeviceMapper",
    errors.MappingBusyError: f"{names.BUS_ERROR_PREFIX}MappingBusy",
    errors.MountError: f"{names.BUS_ERROR_PREFIX}Mount",
    errors.MountBusyError: f"{names.BUS_ERROR_PREFIX}MountBusy",
    OSError: f"{names.BUS_ERROR_PREFIX}Failed",
}
"""Under which name each error goes over the bus. A class that has none goes under its base's."""


def error_name(error: Exception) -> str:
    """The D-Bus name of the error, or of the nearest class above it that has one."""
    return next(ERROR_NAMES[kind] for kind in type(error).__mro__ if kind in ERROR_NAMES)


def error_text(error: Exception) -> str:
    """The error's words as a D-Bus string; each holder of a busy volume has a line of its own."""
    text = str(error)
    if isinstance(error, VolumeBusyError) and error.holders:
        before = text.removesuffix("; ".join(error.holders)).rstrip()
        return "\n".join(shown(line) for line in (before, *error.holders))
    return "\n".join(shown(line) for line in text.split("\n"))


@dataclass(frozen=True, slots=True)
class _Property:
    signature: str
    value: Callable[[Any], Any]
    flags: int = DbusPropertyEmitsChangeFlag


@dataclass(frozen=True, slots=True)
class _Method:
    act: Callable[..., Awaitable[Any]]
    """Takes who asks, and the arguments."""
    takes: str = ""
    argument_names: tuple[str, ...] = ()
    returns: str = ""
    result_names: tuple[str, ...] = ()
    checked: bool = True
    """Whether only root and the operators may ask, whatever the bus's own policy lets through."""


_VOLUME: Final[Mapping[str, _Property]] = {
    "Label": _Property("s", lambda entry: shown(entry.volume.partlabel or "")),
    "PartUuid": _Property("s", lambda entry: shown(entry.volume.partuuid or "")),
    "Device": _Property("s", lambda entry: shown(entry.volume.node), DbusPropertyConstFlag),
    "DiskSeq": _Property(
        "t", lambda entry: min(entry.volume.id.diskseq, _U64), DbusPropertyConstFlag
    ),
    "Partition": _Property(
        "u", lambda entry: min(entry.volume.id.partition, _U32), DbusPropertyConstFlag
    ),
    "Rule": _Property("s", lambda entry: shown(entry.rule)),
    "State": _Property("s", lambda entry: entry.state.value),
    "StateReason": _Property("s", lambda entry: shown(entry.reason)),
    "MountPoint": _Property("s", lambda entry: shown(entry.mount_point)),
    "MappingDevice": _Property("s", lambda entry: shown(entry.mapping_node)),
    "Filesystem": _Property("s", lambda entry: shown(entry.filesystem)),
    "Size": _Property("t", lambda entry: min(entry.volume.size * SECTOR_BYTES, _U64)),
    "ReadOnly": _Property("b", lambda entry: entry.read_only),
    "Since": _Property("t", lambda entry: min(max(0, int(entry.since * 1e6)), _U64)),
    "Steps": _Property(
        "a{sd}", lambda entry: {shown(step): float(took) for step, took in entry.steps.items()}
    ),
}
_MANAGER: Final[Mapping[str, _Property]] = {
    "Version": _Property("s", lambda _registry: __version__, DbusPropertyConstFlag),
    # Asked for, not told: they change with every state, which is told already.
    "Counters": _Property("a{st}", lambda registry: dict(registry.counters), 0),
}


class Objects:
    """The objects on one connection. Synchronization: loop only."""

    def __init__(
        self,
        connection: Connection,
        registry: StatusRegistry,
        agent: Callable[[], tuple[Requests, Agent] | None],
        group: str = names.OPERATORS,
    ) -> None:
        """`agent`: who does what is asked for, or None while nobody does."""
        self._connection = connection
        self._registry = registry
        self._agent = agent
        self._callers = Callers(connection, group)
        self._calls: set[asyncio.Task[None]] = set()
        self._volumes: dict[VolumeId, _Exported] = {}
        self._manager_slot = connection.bus.add_object_manager(names.BUS_PATH)
        self._manager = self._export(
            names.BUS_PATH,
            names.BUS_MANAGER,
            _MANAGER,
            lambda: _values(_MANAGER, registry),
            {
                "Explain": _Method(
                    self._explain, "s", ("device",), "s", ("explanation",), checked=False
                ),
                "Reload": _Method(self._reload, "", (), "as", ("notices",)),
            },
        )
        for entry in registry.entries():
            self.show(entry)

    def show(self, entry: Entry) -> None:
        """The volume's object says this, or is not there if the board has no such volume."""
        which = entry.volume.id
        exported = self._volumes.get(which)
        if exported is not None and entry.state is not State.GONE:
            self._send(exported.become(_values(_VOLUME, entry)))
            return
        # One that comes takes the place of those that have left unsafely.
        present = {known.volume.id for known in self._registry.entries()}
        for departed in [known for known in self._volumes if known not in present]:
            self._remove(departed)
        if which in present and entry.state is not State.GONE:
            self._add(which, entry)

    async def close(self) -> None:
        """No object is there, and no call is under way."""
        for which in list(self._volumes):
            self._remove(which)
        self._manager.remove()
        self._manager_slot.close()
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _add(self, which: VolumeId, entry: Entry) -> None:
        path = names.bus_path(which)
        values = _values(_VOLUME, entry)
        self._volumes[which] = self._export(
            path,
            names.BUS_VOLUME,
            _VOLUME,
            lambda: values,
            {
                "Unlock": _Method(partial(self._unlock, which)),
                "Lock": _Method(partial(self._lock, which)),
                "Eject": _Method(
                    partial(self._eject, which), "a{sv}", ("options",), "s", ("outcome",)
                ),
                "Retry": _Method(partial(self._retry, which)),
            },
        )
        self._sent(self._connection.bus.emit_object_added, path)

    def _remove(self, which: VolumeId) -> None:
        exported = self._volumes.pop(which)
        self._sent(self._connection.bus.emit_object_removed, exported.path)
        exported.remove()

    async def _unlock(self, which: VolumeId, by: str) -> None:
        await self._requests().unlock(which, by)

    async def _lock(self, which: VolumeId, by: str) -> None:
        await self._requests().lock(which, by)

    async def _retry(self, which: VolumeId, by: str) -> None:
        await self._requests().retry(which, by)

    async def _eject(self, which: VolumeId, by: str, options: dict[str, tuple[str, Any]]) -> str:
        return shown(await self._requests().eject(which, by, power_off=power_off(options)))

    async def _reload(self, by: str) -> list[str]:
        return [shown(notice) for notice in await self._asked()[1].reload(by)]

    async def _explain(self, _by: str, device: str) -> str:
        agent = self._asked()[1]
        text = await apart(f"explain {device}", partial(agent.explain, device), _EXPLAIN_WITHIN_S)
        return "\n".join(shown(line) for line in text.split("\n"))

    def _requests(self) -> Requests:
        return self._asked()[0]

    def _asked(self) -> tuple[Requests, Agent]:
        agent = self._agent()
        if agent is None:
            raise RequestRefusedError("the agent is starting or stopping; ask again when it runs")
        return agent

    def _export(
        self,
        path: str,
        interface: str,
        properties: Mapping[str, _Property],
        values: Callable[[], Mapping[str, Any]],
        methods: Mapping[str, _Method],
    ) -> _Exported:
        exported = _Exported(self._connection, path, interface, properties, values)
        for name, method in methods.items():
            exported.interface.add_method(
                name,
                method.takes,
                method.argument_names,
                method.returns,
                method.result_names,
                DbusUnprivilegedFlag,
                partial(self._take, name, method),
            )
        self._connection.bus.add_interface(exported.interface, path, interface)
        return exported

    def _take(self, name: str, method: _Method, request: SdBusMessage) -> None:
        call = asyncio.get_running_loop().create_task(self._answer(name, method, request))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, name: str, method: _Method, request: SdBusMessage) -> None:
        subject = f"{name} {request.path}"
        try:
            by = await self._permitted(subject, request.sender) if method.checked else ""
            result = await method.act(by, *request.parse_to_tuple())
            reply = request.create_reply()
            if method.returns:
                reply.append_data(method.returns, result)
        except (HotplugError, OSError) as error:
            reply = request.create_error_reply(error_name(error), error_text(error))
        except Exception:  # a defect of ours must not end the service, nor leave a call unanswered
            log.exception("%s: a defect of the agent ended it", subject)
            reply = request.create_error_reply(ERROR_NAMES[HotplugError], _DEFECT)
        if request.expect_reply:
            self._send(reply)

    async def _permitted(self, subject: str, sender: str | None) -> str:
        """Who asks, in words. Raises: NotPermittedError if only others may ask for this."""
        caller = await self._callers.caller(sender or "")
        if not caller.is_operator:
            why = "only root and the operators may ask for it"
            refused = journal.event(
                journal.Event.REQUEST_REFUSED, request=subject, requested_by=caller, reason=why
            )
            log.warning("%s: refused to %s", subject, caller, extra=refused)
            raise NotPermittedError(
                f"{subject}: only root and members of group {self._callers.group} may ask for it"
            )
        return str(caller)

    def _send(self, message: SdBusMessage | None) -> None:
        if message is not None:
            self._sent(message.send)

    def _sent(self, send: Callable[..., None], *arguments: str) -> None:
        """The bus has it; a bus that takes nothing any more is lost."""
        try:
            send(*arguments)
        except SdBusBaseError as error:
            log.debug("the bus takes nothing: %s", words(error))
            self._connection.lost.set()


class _Exported:
    """One object with one interface of ours, and the values that it shows."""

    def __init__(
        self,
        connection: Connection,
        path: str,
        name: str,
        properties: Mapping[str, _Property],
        values: Callable[[], Mapping[str, Any]],
    ) -> None:
        self.path = path
        self.interface = SdBusInterface()
        self._connection = connection
        self._name = name
        self._properties = properties
        self._values = values
        for property_name, of in properties.items():
            self.interface.add_property(
                property_name, of.signature, partial(self._get, property_name), None, of.flags
            )

    def become(self, values: Mapping[str, Any]) -> SdBusMessage | None:
        """It shows these values from now on. Returns the signal that says what has changed."""
        before, self._values = self._values(), lambda: values
        changed = {
            name: (self._properties[name].signature, value)
            for name, value in values.items()
            if value != before[name]
        }
        if not changed:
            return None
        signal = self._connection.bus.new_signal_message(
            self.path, "org.freedesktop.DBus.Properties", "PropertiesChanged"
        )
        signal.append_data("sa{sv}as", self._name, changed, [])
        return signal

    def remove(self) -> None:
        """It is not there any more.

        What sdbus calls is held by its interface, which Python's collector cannot look into: as
        long as that and we hold each other, neither is freed.
        """
        stop_export(self.interface)
        del self.interface

    def _get(self, name: str, message: SdBusMessage) -> None:
        message.append_data(self._properties[name].signature, self._values()[name])


def _values(properties: Mapping[str, _Property], subject: object) -> dict[str, Any]:
    return {name: of.value(subject) for name, of in properties.items()}


def power_off(options: Mapping[str, tuple[str, Any]]) -> bool:
    """What the options of Eject say. Raises: ArgumentsError for one that it does not know."""
    for name, (signature, _) in options.items():
        if name != "power-off":
            raise ArgumentsError(f"eject: {shown(name)} is no option; there is 'power-off'")
        if signature != "b":
            raise ArgumentsError(f"eject: option 'power-off' is a boolean (b), not {signature}")
    return bool(options.get("power-off", ("b", True))[1])
