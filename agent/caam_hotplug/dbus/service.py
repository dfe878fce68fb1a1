"""The agent on the system bus, if there is one: it serves media with or without."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from caam_hotplug import names
from caam_hotplug.model import Entry

if TYPE_CHECKING:
    from caam_hotplug.dbus.connection import Connection
    from caam_hotplug.dbus.objects import Agent, Objects, Requests

log = logging.getLogger(__name__)

_LOOK_AGAIN_S: Final = 10.0


class StatusRegistry(Protocol):
    """Where the volumes' states are published: `board.Board`."""

    counters: Counter[str]
    """How often a volume came to each state, by the state's name."""

    def entries(self) -> list[Entry]: ...
    def listen(self, listener: Callable[[Entry], None]) -> None: ...


class Service:
    """What the board says is on the bus whenever there is one, and requests are passed on.

    Synchronization: loop only.
    """

    def __init__(
        self,
        registry: StatusRegistry,
        *,
        group: str = names.OPERATORS,
        look_again_s: float = _LOOK_AGAIN_S,
    ) -> None:
        self._registry = registry
        self._group = group
        self._look_again_s = look_again_s
        self._agent: tuple[Requests, Agent] | None = None
        self._objects: Objects | None = None
        self._tried = asyncio.Event()
        self._said_without = False
        registry.listen(self._heard)

    async def __aenter__(self) -> Service:
        self._task = asyncio.create_task(self._stay())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        with suppress(asyncio.CancelledError):
            await self._task

    def accept(self, requests: Requests, agent: Agent) -> None:
        """Requests go to these from now on; until then they are refused."""
        self._agent = (requests, agent)

    async def tried(self, within_s: float) -> None:
        """The agent is on the bus, or it was tried for once, or so much time has passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._tried.wait()

    async def _stay(self) -> None:
        try:
            from caam_hotplug.dbus import connection, objects  # noqa: PLC0415  sdbus is an extra
        except ImportError as error:
            self._say_without(f"{error}; the extra `dbus` brings it")
            return
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            with self._contained():
                try:
                    link = connection.Connection()
                    try:
                        await self._serve(link, objects.Objects)
                    finally:
                        link.close()
                except connection.NoBusError as error:
                    self._say_without(str(error))
            # Nothing tells of a bus that comes, so it is looked for. One that was there may be
            # back at once: its socket is the service manager's.
            if clock() - begun < self._look_again_s:
                await asyncio.sleep(self._look_again_s)

    async def _serve(self, link: Connection, make_objects: type[Objects]) -> None:
        """The agent was on the bus, until the bus went away. Raises: NoBusError."""
        await link.greet()
        self._objects = make_objects(link, self._registry, lambda: self._agent, self._group)
        try:
            await link.own(names.BUS_NAME)
            log.info("on the system bus as %s", names.BUS_NAME)
            self._said_without = False
            self._tried.set()
            await link.lost.wait()
            log.warning("the system bus has gone; the agent goes on without it")
        finally:
            objects, self._objects = self._objects, None
            await objects.close()

    def _heard(self, entry: Entry) -> None:
        if self._objects is not None:
            with self._contained():
                self._objects.show(entry)

    def _say_without(self, why: str) -> None:
        self._tried.set()
        if not self._said_without:
            self._said_without = True
            log.info("no system bus, and media are served without: %s", why)

    @contextmanager
    def _contained(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # a defect of ours on the bus must not cost volumes their mounts
            log.exception("a defect of the agent's D-Bus service; media are served all the same")
