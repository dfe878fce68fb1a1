"""Units of the service manager, started over the system bus and waited for.

Source: org.freedesktop.systemd1(5).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from caam_hotplug.errors import HotplugError
from caam_hotplug.systemd import journal

if TYPE_CHECKING:
    from caam_hotplug.dbus.connection import Connection

    Work = Callable[[Connection, str], Coroutine[Any, Any, None]]

log = logging.getLogger(__name__)

_SYSTEMD: Final = "org.freedesktop.systemd1"
_MANAGER: Final = (_SYSTEMD, "/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager")
_REPLACE: Final = "replace"


class SystemdUnits:
    """The service manager; what fails of a unit is logged. Synchronization: loop only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, unit: str) -> None:
        """The service manager is asked to start the unit; nobody waits for that."""
        task = asyncio.create_task(self._logged(unit, _begin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, unit: str, within_s: float) -> None:
        """The unit was started and has come to its end, failed, or had its time.

        A service has come to its end when its start has: one of `Type=oneshot` when it is done.
        """
        try:
            async with asyncio.timeout(within_s):
                await self._logged(unit, _complete)
        except TimeoutError:
            late = journal.event(journal.Event.HOOK, unit=unit)
            log.warning("%s has not ended within %g s; going on", unit, within_s, extra=late)

    async def _logged(self, unit: str, work: Work) -> None:
        fields = journal.event(journal.Event.HOOK, unit=unit)
        try:
            await _over_the_bus(unit, work)
        except HotplugError as error:
            log.warning("start %s: %s", unit, error, extra=fields)
        else:
            log.info("started %s", unit, extra=fields)


async def _over_the_bus(unit: str, work: Work) -> None:
    """Raises: HotplugError."""
    try:
        import sdbus  # noqa: PLC0415  an extra

        from caam_hotplug.dbus import connection  # noqa: PLC0415
    except ImportError as error:
        raise HotplugError(f"{error}; the extra `dbus` brings it") from error
    link = connection.Connection()
    try:
        await work(link, unit)
    except sdbus.SdBusBaseError as error:
        raise HotplugError(connection.words(error)) from error
    finally:
        link.close()


async def _begin(link: Connection, unit: str) -> None:
    await link.call(_MANAGER, "StartUnit", "ss", unit, _REPLACE)


async def _complete(link: Connection, unit: str) -> None:
    """Raises: HotplugError if the unit has failed."""
    ended: dict[str, str] = {}
    news = asyncio.Event()

    def removed(message: Any) -> None:
        _, job, _, result = message.get_contents()
        ended[job] = result
        news.set()

    _slot = await link.bus.match_signal_async(_SYSTEMD, *_MANAGER[1:], "JobRemoved", removed)
    await link.call(_MANAGER, "Subscribe")
    job = await link.call(_MANAGER, "StartUnit", "ss", unit, _REPLACE)
    lost = asyncio.ensure_future(link.lost.wait())
    try:
        while job not in ended:
            news.clear()
            heard = asyncio.ensure_future(news.wait())
            await asyncio.wait({heard, lost}, return_when=asyncio.FIRST_COMPLETED)
            heard.cancel()
            if lost.done():
                raise HotplugError("the bus has gone")
    finally:
        lost.cancel()
    if ended[job] != "done":
        raise HotplugError(f"its start ended as {ended[job]!r}")
