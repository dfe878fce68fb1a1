"""The command `watch`: follows the agent and prints a line for each change."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import sdbus

from caam_hotplug import names
from caam_hotplug.cli import listing
from caam_hotplug.dbus.client import (
    OBJECTS,
    PROPERTIES,
    NotRunningError,
    Remote,
    command_error,
)
from caam_hotplug.dbus.connection import BUS
from caam_hotplug.dbus.sdbus_internals import SdBusMessage
from caam_hotplug.dbus.volume_view import ShownVolume

_Properties = dict[str, tuple[str, Any]]


async def follow(agent: Remote, *, as_json: bool, coloured: bool) -> None:
    """Print every change until the bus ends. Raises: NotRunningError then."""
    follower = _Follower(agent, _Printer(as_json=as_json, coloured=coloured))
    try:
        await follower.subscribe()
    except sdbus.SdBusBaseError as error:
        raise command_error(error, agent.what) from error
    await follower.run()


class _Printer:
    """Prints changes on standard output."""

    def __init__(self, *, as_json: bool, coloured: bool) -> None:
        self._as_json = as_json
        self._coloured = coloured
        self._last: dict[str, str] = {}

    def volume(self, event: str, path: str, volume: ShownVolume) -> None:
        """Print a change of a volume."""
        if self._as_json:
            self._object({"event": event, "volume": listing.as_json(volume)})
            return
        text = "gone" if event == "removed" else volume.status_text
        if self._last.get(path) == text:  # only --json shows what has changed
            return
        self._last[path] = text
        if event == "removed":
            del self._last[path]
        shown = listing.in_colour(text, volume.state) if self._coloured else text
        at = f" ({volume.device})" if volume.label else ""
        self._line(f"{volume.display_name}{at}: {shown}")

    def agent(self, event: str, text: str) -> None:
        """Print a change of the agent."""
        self._last.clear()  # the next status of each volume is printed in any case
        if self._as_json:
            self._object({"event": event})
        else:
            self._line(text)

    def _object(self, members: dict[str, Any]) -> None:
        print(json.dumps({"time_us": time.time_ns() // 1000, **members}))
        sys.stdout.flush()

    def _line(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {text}")
        sys.stdout.flush()


class _Follower:
    """Takes signals and the agent's one reply in the order in which the bus delivered them.

    A coroutine that awaits a reply resumes later than a signal's callback is called. sdbus calls
    the callbacks of replies and of signals from the loop in order. So both put work in one queue.
    """

    def __init__(self, agent: Remote, printer: _Printer) -> None:
        self._agent = agent
        self._connection = agent.connection
        self._printer = printer
        self._queue: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._volumes: dict[str, _Properties] = {}
        self._owner = ""
        self._is_known = False
        """Whether the volumes are known. Signals before the reply are included in it."""
        self._slots: list[object] = []

    async def subscribe(self) -> None:
        """Put all changes from now on in the queue, after the present volumes."""
        name, path, interface = OBJECTS
        for sender, at, of, member, take in (
            (names.BUS_NAME, path, interface, "InterfacesAdded", self._added),
            (names.BUS_NAME, path, interface, "InterfacesRemoved", self._removed),
            (names.BUS_NAME, None, PROPERTIES, "PropertiesChanged", self._changed),
            (BUS[0], BUS[1], BUS[2], "NameOwnerChanged", self._owned),
        ):
            self._slots.append(
                await self._connection.bus.match_signal_async(
                    sender, at, of, member, self._in_turn(take)
                )
            )
        try:
            self._owner = await self._connection.call(BUS, "GetNameOwner", "s", name)
        except sdbus.DbusNameHasNoOwnerError:
            self._printer.agent("agent-stopped", "the agent does not run; waiting for it")
        else:
            self._request_volumes()

    async def run(self) -> None:
        """Carry out the queue. Raises: NotRunningError when the bus ends."""
        lost = asyncio.ensure_future(self._connection.lost.wait())
        try:
            while True:
                turn = asyncio.ensure_future(self._queue.get())
                await asyncio.wait({turn, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not turn.done():
                    turn.cancel()
                    raise NotRunningError(f"{self._agent.what}: the bus has gone")
                turn.result()()
        finally:
            lost.cancel()

    def _in_turn(self, take: Callable[[SdBusMessage], None]) -> Callable[[SdBusMessage], None]:
        def put(message: SdBusMessage) -> None:
            self._queue.put_nowait(lambda: take(message))

        return put

    def _request_volumes(self) -> None:
        """Request the present volumes."""
        self._is_known = False
        owner = self._owner
        self._reply = self._connection.begin(OBJECTS, "GetManagedObjects")
        self._reply.add_done_callback(
            lambda done: self._queue.put_nowait(lambda: self._take_volumes(done, owner))
        )

    def _take_volumes(self, reply: asyncio.Future[SdBusMessage], owner: str) -> None:
        if owner != self._owner:  # the reply is from an agent that has ended
            reply.exception()
            return
        try:
            objects: Any = reply.result().get_contents()
        except sdbus.SdBusBaseError as error:
            if isinstance(command_error(error, ""), NotRunningError):
                return  # NameOwnerChanged follows
            raise command_error(error, self._agent.what) from error
        self._is_known = True
        for path, interfaces in objects.items():
            if names.BUS_VOLUME in interfaces:
                self._volumes[path] = interfaces[names.BUS_VOLUME]
                self._print("present", path)

    def _added(self, message: SdBusMessage) -> None:
        path, interfaces = message.parse_to_tuple()
        if self._is_known and names.BUS_VOLUME in interfaces:
            self._volumes[path] = interfaces[names.BUS_VOLUME]
            self._print("added", path)

    def _changed(self, message: SdBusMessage) -> None:
        interface, changed, _ = message.parse_to_tuple()
        path = message.path or ""
        if self._is_known and interface == names.BUS_VOLUME and path in self._volumes:
            self._volumes[path] |= changed
            self._print("changed", path)

    def _removed(self, message: SdBusMessage) -> None:
        path, interfaces = message.parse_to_tuple()
        if self._is_known and names.BUS_VOLUME in interfaces and path in self._volumes:
            self._print("removed", path)
            del self._volumes[path]

    def _owned(self, message: SdBusMessage) -> None:
        name, _, owner = message.parse_to_tuple()
        if name != names.BUS_NAME or owner == self._owner:
            return
        self._owner = owner
        self._is_known = False
        self._volumes.clear()
        if owner:
            self._printer.agent("agent-started", "the agent runs")
            self._request_volumes()
        else:
            self._printer.agent("agent-stopped", "the agent has stopped; waiting for it")

    def _print(self, event: str, path: str) -> None:
        shown = {name: value for name, (_, value) in self._volumes[path].items()}
        self._printer.volume(event, path, ShownVolume.from_properties(shown))
