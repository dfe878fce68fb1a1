"""The agent's service on the system bus. Without a bus the agent serves media all the same."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Final, Protocol

from caam_hotplug import names
from caam_hotplug.model import Entry, VolumeId

if TYPE_CHECKING:
    from caam_hotplug.dbus.connection import Connection
    from caam_hotplug.dbus.objects import Agent, Objects, Requests

log = logging.getLogger(__name__)

_RETRY_AFTER_S: Final = 10.0


class StatusRegistry(Protocol):
    """Publishes the status of every volume: `status_registry.StatusRegistry`."""

    counters: Counter[str]
    """How often volumes came to each state, by the state's name."""

    def entries(self) -> list[Entry]: ...
    def entry(self, which: VolumeId) -> Entry | None: ...
    def listen(self, listener: Callable[[Entry], None]) -> None: ...


class Service:
    """Shows the status registry on the bus whenever there is one, and passes requests on.

    Synchronization: loop only.
    """

    def __init__(
        self,
        registry: StatusRegistry,
        is_at_work: Callable[[], bool] = bool,
        *,
        group: str = names.OPERATORS,
        retry_after_s: float = _RETRY_AFTER_S,
    ) -> None:
        """`is_at_work`: whether a medium is served now, which goes before requests."""
        self._registry = registry
        self._is_at_work = is_at_work
        self._group = group
        self._retry_after_s = retry_after_s
        self._agent: tuple[Requests, Agent] | None = None
        self._objects: Objects | None = None
        self._attempted = asyncio.Event()
        self._is_absence_logged = False
        registry.listen(self._update)

    async def __aenter__(self) -> Service:
        self._task = asyncio.create_task(self._run())
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
        """Pass requests on to these from now on; until then they are refused."""
        self._agent = (requests, agent)

    async def first_attempt(self, within_s: float) -> None:
        """Wait until the agent is on the bus, or has tried once, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._attempted.wait()

    async def _run(self) -> None:
        try:
            from caam_hotplug.dbus import connection, objects, relay  # noqa: PLC0415  sdbus is an extra
        except ImportError as error:
            self._log_absence(f"{error}; install sdbus (the extra `dbus`)")
            return
        clock = asyncio.get_running_loop().time
        while True:
            begun = clock()
            with self._defects_logged():
                try:
                    link = connection.Connection(relay.AGENTS, self._is_at_work)
                    try:
                        await self._serve(link, objects.Objects)
                    finally:
                        link.close()
                except connection.NoBusError as error:
                    self._log_absence(str(error))
            # No event announces a bus, so the attempt is repeated. After a bus has gone, the next
            # attempt is made at once: systemd holds its socket, and connecting starts it again.
            if clock() - begun < self._retry_after_s:
                await asyncio.sleep(self._retry_after_s)

    async def _serve(self, link: Connection, make_objects: type[Objects]) -> None:
        """Stay on the bus until it goes away. Raises: NoBusError."""
        await link.ping()
        self._objects = make_objects(link, self._registry, lambda: self._agent, self._group)
        try:
            await link.own(names.BUS_NAME)
            log.info("on the system bus as %s", names.BUS_NAME)
            self._is_absence_logged = False
            self._attempted.set()
            await link.lost.wait()
            log.warning("the system bus has gone; media are served without it")
        finally:
            objects, self._objects = self._objects, None
            await objects.close()

    def _update(self, entry: Entry) -> None:
        if self._objects is not None:
            with self._defects_logged():
                self._objects.update(entry)

    def _log_absence(self, why: str) -> None:
        self._attempted.set()
        if not self._is_absence_logged:
            self._is_absence_logged = True
            log.info("no system bus, media are served without it: %s", why)

    @contextmanager
    def _defects_logged(self) -> Iterator[None]:
        try:
            yield
        except Exception:  # a defect of this service must not unmount volumes
            log.exception("a defect of the agent's D-Bus service; media are served without it")
