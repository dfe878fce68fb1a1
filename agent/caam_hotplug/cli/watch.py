"""Following the agent: what changes, a line each."""

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
    in_words,
)
from caam_hotplug.dbus.connection import BUS
from caam_hotplug.dbus.sdbus_internals import SdBusMessage
from caam_hotplug.dbus.volume_view import ShownVolume

_Properties = dict[str, tuple[str, Any]]


async def follow(asked: Remote, *, as_json: bool, coloured: bool) -> None:
    """Every change is told until the bus ends. Raises: NotRunningError then."""
    follower = _Follower(asked, _Told(as_json=as_json, coloured=coloured))
    try:
        await follower.subscribe()
    except sdbus.SdBusBaseError as error:
        raise in_words(error, asked.what) from error
    await follower.run()


class _Told:
    """Says what happens on standard output."""

    def __init__(self, *, as_json: bool, coloured: bool) -> None:
        self._as_json = as_json
        self._coloured = coloured
        self._last: dict[str, str] = {}

    def volume(self, event: str, path: str, volume: ShownVolume) -> None:
        """This has happened to a volume."""
        if self._as_json:
            self._object({"event": event, "volume": listing.as_json(volume)})
            return
        said = "gone" if event == "removed" else volume.said
        if self._last.get(path) == said:  # what has changed is for programs only
            return
        self._last[path] = said
        if event == "removed":
            del self._last[path]
        shown = listing.in_colour(said, volume.state) if self._coloured else said
        at = f" ({volume.device})" if volume.label else ""
        self._line(f"{volume.called}{at}: {shown}")

    def agent(self, event: str, words: str) -> None:
        """This has happened to the agent."""
        self._last.clear()  # whatever it says of a volume next is news
        if self._as_json:
            self._object({"event": event})
        else:
            self._line(words)

    def _object(self, members: dict[str, Any]) -> None:
        print(json.dumps({"time_us": time.time_ns() // 1000, **members}))
        sys.stdout.flush()

    def _line(self, words: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {words}")
        sys.stdout.flush()


class _Follower:
    """Takes signals and the one reply of the agent in the order in which the bus brought them.

    Whoever awaits a reply goes on later than a signal's callback is called. A reply's callback is
    called in its turn, as sdbus calls both by way of the loop; so all are put in one queue there.
    """

    def __init__(self, asked: Remote, told: _Told) -> None:
        self._asked = asked
        self._connection = asked.connection
        self._told = told
        self._queue: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        self._volumes: dict[str, _Properties] = {}
        self._owner = ""
        self._is_known = False
        """Whether the volumes are; signals from before are contained in what is asked for."""
        self._slots: list[object] = []

    async def subscribe(self) -> None:
        """What happens from now on is put in the queue; first what there is now."""
        name, path, interface = OBJECTS
        for of, at, member, take in (
            ((names.BUS_NAME, interface), path, "InterfacesAdded", self._added),
            ((names.BUS_NAME, interface), path, "InterfacesRemoved", self._removed),
            ((names.BUS_NAME, PROPERTIES), None, "PropertiesChanged", self._changed),
            ((BUS[0], BUS[2]), BUS[1], "NameOwnerChanged", self._owned),
        ):
            self._slots.append(
                await self._connection.bus.match_signal_async(
                    of[0], at, of[1], member, self._in_turn(take)
                )
            )
        try:
            self._owner = await self._connection.call(BUS, "GetNameOwner", "s", name)
        except sdbus.DbusNameHasNoOwnerError:
            self._told.agent("agent-stopped", "the agent does not run; waiting for it")
        else:
            self._look()

    async def run(self) -> None:
        """Raises: NotRunningError when the bus ends."""
        lost = asyncio.ensure_future(self._connection.lost.wait())
        try:
            while True:
                turn = asyncio.ensure_future(self._queue.get())
                await asyncio.wait({turn, lost}, return_when=asyncio.FIRST_COMPLETED)
                if not turn.done():
                    turn.cancel()
                    raise NotRunningError(f"{self._asked.what}: the bus has gone")
                turn.result()()
        finally:
            lost.cancel()

    def _in_turn(self, take: Callable[[SdBusMessage], None]) -> Callable[[SdBusMessage], None]:
        def put(message: SdBusMessage) -> None:
            self._queue.put_nowait(lambda: take(message))

        return put

    def _look(self) -> None:
        """What there is has been asked for."""
        self._is_known = False
        owner = self._owner
        self._reply = self._connection.begin(OBJECTS, "GetManagedObjects")
        self._reply.add_done_callback(
            lambda done: self._queue.put_nowait(lambda: self._known(done, owner))
        )

    def _known(self, reply: asyncio.Future[SdBusMessage], owner: str) -> None:
        if owner != self._owner:  # another agent has been asked meanwhile
            reply.exception()
            return
        try:
            objects: Any = reply.result().get_contents()
        except sdbus.SdBusBaseError as error:
            if isinstance(in_words(error, ""), NotRunningError):
                return  # its end is told in its turn
            raise in_words(error, self._asked.what) from error
        self._is_known = True
        for path, interfaces in objects.items():
            if names.BUS_VOLUME in interfaces:
                self._volumes[path] = interfaces[names.BUS_VOLUME]
                self._tell("present", path)

    def _added(self, message: SdBusMessage) -> None:
        path, interfaces = message.parse_to_tuple()
        if self._is_known and names.BUS_VOLUME in interfaces:
            self._volumes[path] = interfaces[names.BUS_VOLUME]
            self._tell("added", path)

    def _changed(self, message: SdBusMessage) -> None:
        interface, changed, _ = message.parse_to_tuple()
        path = message.path or ""
        if self._is_known and interface == names.BUS_VOLUME and path in self._volumes:
            self._volumes[path] |= changed
            self._tell("changed", path)

    def _removed(self, message: SdBusMessage) -> None:
        path, interfaces = message.parse_to_tuple()
        if self._is_known and names.BUS_VOLUME in interfaces and path in self._volumes:
            self._tell("removed", path)
            del self._volumes[path]

    def _owned(self, message: SdBusMessage) -> None:
        name, _, owner = message.parse_to_tuple()
        if name != names.BUS_NAME or owner == self._owner:
            return
        self._owner = owner
        self._is_known = False
        self._volumes.clear()
        if owner:
            self._told.agent("agent-started", "the agent runs")
            self._look()
        else:
            self._told.agent("agent-stopped", "the agent has stopped; waiting for it")

    def _tell(self, event: str, path: str) -> None:
        shown = {name: value for name, (_, value) in self._volumes[path].items()}
        self._told.volume(event, path, ShownVolume.from_properties(shown))
