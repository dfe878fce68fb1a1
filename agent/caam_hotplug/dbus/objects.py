"""The objects on the bus: the manager and one for every volume.

`config/org.caamhotplug1.xml` is the contract; a test compares it with what is exported here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Protocol

from sdbus import DbusUnprivilegedFlag, SdBusBaseError

from caam_hotplug import names
from caam_hotplug.dbus.authorization import Callers
from caam_hotplug.dbus.connection import Connection, error_message
from caam_hotplug.dbus.error_names import (
    ERROR_NAMES,
    ArgumentsError,
    NotPermittedError,
    error_name,
    error_text,
)
from caam_hotplug.dbus.exported import ExportedObject, Method
from caam_hotplug.dbus.properties import MANAGER, VOLUME, Property, values_of
from caam_hotplug.dbus.sdbus_internals import SdBusMessage
from caam_hotplug.errors import HotplugError, RequestRefusedError, shown
from caam_hotplug.kernel.abandonable import run_in_thread
from caam_hotplug.model import Entry, State, VolumeId
from caam_hotplug.systemd import journal

log = logging.getLogger(__name__)

_EXPLAIN_WITHIN_S: Final = 60.0
_LOOKS_AFTER_S: Final = 1.0
_DEFECT: Final = "a defect of the agent; the journal has the details"


class Requests(Protocol):
    """Carries out requests for a volume: the supervisor."""

    async def lock(self, volume: VolumeId, by: str) -> None: ...
    async def eject(self, volume: VolumeId, by: str, *, power_off: bool = True) -> str: ...
    async def unlock(self, volume: VolumeId, by: str, *, mounts: bool = True) -> None: ...
    async def retry(self, volume: VolumeId, by: str) -> None: ...


class Agent(Protocol):
    """Carries out requests for the agent as a whole."""

    async def reload(self, by: str) -> list[str]: ...

    def look(self, volume: VolumeId) -> None:
        """Have the volume looked at, for the next who reads its properties."""
        ...

    def explain(self, device: str) -> str:
        """Synchronization: called in its own thread, since it may read from a faulty medium."""
        ...


class StatusRegistry(Protocol):
    """Has the published status of every volume."""

    counters: Counter[str]

    def entries(self) -> list[Entry]: ...
    def entry(self, which: VolumeId) -> Entry | None: ...


class Objects:
    """The objects on one connection. Synchronization: loop only."""

    def __init__(
        self,
        connection: Connection,
        registry: StatusRegistry,
        agent: Callable[[], tuple[Requests, Agent] | None],
        group: str = names.OPERATORS,
    ) -> None:
        """`agent`: returns who carries out requests, or None while the agent starts or stops."""
        self._connection = connection
        self._registry = registry
        self._agent = agent
        self._callers = Callers(connection, group)
        self._calls: set[asyncio.Task[None]] = set()
        self._volumes: dict[VolumeId, ExportedObject] = {}
        self._is_adding = False
        self._manager_slot = connection.bus.add_object_manager(names.BUS_PATH)
        self._manager = self._export(
            names.BUS_PATH,
            names.BUS_MANAGER,
            MANAGER,
            {
                "Explain": Method(
                    self._explain, "s", ("device",), "s", ("explanation",), is_restricted=False
                ),
                "Reload": Method(self._reload, "", (), "as", ("notices",)),
            },
            subject=lambda: registry,
        )
        for entry in registry.entries():
            self.update(entry)

    def update(self, entry: Entry) -> None:
        """Update the volume's object, or add or remove it as the status registry does."""
        which = entry.volume.id
        exported = self._volumes.get(which)
        if exported is not None and entry.state is not State.GONE:
            self._send(exported.update(values_of(VOLUME, entry)))
            return
        # The registry forgets volumes that were removed unsafely when another one arrives.
        present = {known.volume.id for known in self._registry.entries()}
        for departed in [known for known in self._volumes if known not in present]:
            self._remove(departed)
        if which in present and entry.state is not State.GONE:
            self._add(which, entry)

    async def close(self) -> None:
        """Remove all objects and cancel all calls."""
        for which in list(self._volumes):
            self._remove(which)
        self._manager.remove()
        self._manager_slot.close()
        for call in list(self._calls):
            call.cancel()
        await asyncio.gather(*self._calls, return_exceptions=True)

    def _add(self, which: VolumeId, entry: Entry) -> None:
        path = names.bus_path(which)
        self._volumes[which] = self._export(
            path,
            names.BUS_VOLUME,
            VOLUME,
            {
                "Unlock": Method(partial(self._unlock, which)),
                "UnlockWithoutMount": Method(partial(self._unlock, which, mounts=False)),
                "Lock": Method(partial(self._lock, which)),
                "Eject": Method(
                    partial(self._eject, which), "a{sv}", ("options",), "s", ("outcome",)
                ),
                "Retry": Method(partial(self._retry, which)),
            },
            subject=lambda: self._registry.entry(which) or entry,
            reading=self._look(which),
        )
        self._is_adding = True
        self._try_to_send(self._connection.bus.emit_object_added, path)
        self._is_adding = False

    def _look(self, which: VolumeId) -> Callable[[], None]:
        """Return what has the volume looked at when it is read: at most once a second."""
        clock, looked_at = asyncio.get_running_loop().time, -math.inf

        def look() -> None:
            nonlocal looked_at
            now = clock()
            # A client reads many properties at once, and so does sdbus when an object is added.
            if now - looked_at < _LOOKS_AFTER_S or self._is_adding:
                return
            looked_at = now
            if (agent := self._agent()) is not None:
                agent[1].look(which)

        return look

    def _remove(self, which: VolumeId) -> None:
        exported = self._volumes.pop(which)
        self._try_to_send(self._connection.bus.emit_object_removed, exported.path)
        exported.remove()

    async def _unlock(self, which: VolumeId, by: str, *, mounts: bool = True) -> None:
        await self._requests().unlock(which, by, mounts=mounts)

    async def _lock(self, which: VolumeId, by: str) -> None:
        await self._requests().lock(which, by)

    async def _retry(self, which: VolumeId, by: str) -> None:
        await self._requests().retry(which, by)

    async def _eject(self, which: VolumeId, by: str, options: dict[str, tuple[str, Any]]) -> str:
        return shown(await self._requests().eject(which, by, power_off=power_off(options)))

    async def _reload(self, by: str) -> list[str]:
        return [shown(notice) for notice in await self._running_agent()[1].reload(by)]

    async def _explain(self, _by: str, device: str) -> str:
        agent = self._running_agent()[1]
        text = await run_in_thread(
            f"explain {device}", partial(agent.explain, device), _EXPLAIN_WITHIN_S
        )
        return "\n".join(shown(line) for line in text.split("\n"))

    def _requests(self) -> Requests:
        return self._running_agent()[0]

    def _running_agent(self) -> tuple[Requests, Agent]:
        agent = self._agent()
        if agent is None:
            raise RequestRefusedError("the agent is starting or stopping; try again later")
        return agent

    def _export(
        self,
        path: str,
        interface: str,
        properties: Mapping[str, Property],
        methods: Mapping[str, Method],
        *,
        subject: Callable[[], object],
        reading: Callable[[], None] = lambda: None,
    ) -> ExportedObject:
        exported = ExportedObject(
            self._connection, path, interface, properties, subject=subject, reading=reading
        )
        for name, method in methods.items():
            exported.interface.add_method(
                name,
                method.takes,
                method.argument_names,
                method.returns,
                method.result_names,
                DbusUnprivilegedFlag,
                partial(self._begin, name, method),
            )
        self._connection.bus.add_interface(exported.interface, path, interface)
        return exported

    def _begin(self, name: str, method: Method, request: SdBusMessage) -> None:
        call = asyncio.get_running_loop().create_task(self._answer(name, method, request))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)

    async def _answer(self, name: str, method: Method, request: SdBusMessage) -> None:
        subject = f"{name} {request.path}"
        try:
            by = await self._permitted(subject, request.sender) if method.is_restricted else ""
            result = await method.act(by, *request.parse_to_tuple())
            reply = request.create_reply()
            if method.returns:
                reply.append_data(method.returns, result)
        except (HotplugError, OSError) as error:
            reply = request.create_error_reply(error_name(error), error_text(error))
        except Exception:  # a defect must neither end the service nor leave a call without reply
            log.exception("%s: a defect of the agent ended it", subject)
            reply = request.create_error_reply(ERROR_NAMES[HotplugError], _DEFECT)
        if request.expect_reply:
            self._send(reply)

    async def _permitted(self, subject: str, sender: str | None) -> str:
        """Return the caller as text. Raises: NotPermittedError if it is no operator."""
        caller = await self._callers.caller(sender or "")
        if not caller.is_operator:
            why = "only root and the operators may request it"
            refused = journal.event(
                journal.Event.REQUEST_REFUSED, request=subject, requested_by=caller, reason=why
            )
            log.warning("%s: refused to %s", subject, caller, extra=refused)
            raise NotPermittedError(
                f"{subject}: only root and members of group {self._callers.group} may request it"
            )
        return str(caller)

    def _send(self, message: SdBusMessage | None) -> None:
        if message is not None:
            self._try_to_send(message.send)

    def _try_to_send(self, send: Callable[..., None], *arguments: str) -> None:
        """Send; a bus that takes nothing any more is lost."""
        try:
            send(*arguments)
            self._connection.flush()
        except SdBusBaseError as error:
            log.debug("the bus takes nothing: %s", error_message(error))
            self._connection.lost.set()


def power_off(options: Mapping[str, tuple[str, Any]]) -> bool:
    """Return whether to power off, by the options of Eject. Raises: ArgumentsError."""
    for name, (signature, _) in options.items():
        if name != "power-off":
            raise ArgumentsError(f"eject: {shown(name)} is no option; there is 'power-off'")
        if signature != "b":
            raise ArgumentsError(f"eject: option 'power-off' is a boolean (b), not {signature}")
    return bool(options.get("power-off", ("b", True))[1])
