"""Starts units of the service manager over the system bus.

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
    """The service manager. A failure of a unit is logged only. Synchronization: loop only."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, unit: str) -> None:
        """Start the unit without waiting for it."""
        task = asyncio.create_task(self._logged(unit, _begin))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def finish(self, unit: str, within_s: float) -> None:
        """Start the unit and wait until its start has ended, or failed, or the time is over.

        The start of a service of `Type=oneshot` ends when the service does.
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
            await _with_connection(unit, work)
        except HotplugError as error:
            log.warning("start %s: %s", unit, error, extra=fields)
        else:
            log.info("started %s", unit, extra=fields)


async def _with_connection(unit: str, work: Work) -> None:
    """Raises: HotplugError."""
    try:
        import sdbus  # noqa: PLC0415  an extra

        from caam_hotplug.dbus import connection, relay  # noqa: PLC0415
    except ImportError as error:
        raise HotplugError(f"{error}; install sdbus (the extra `dbus`)") from error
    link = connection.Connection(relay.OF_UNITS)
    try:
        await work(link, unit)
    except sdbus.SdBusBaseError as error:
        raise HotplugError(connection.error_message(error)) from error
    finally:
        link.close()


async def _begin(link: Connection, unit: str) -> None:
    await link.call(_MANAGER, "StartUnit", "ss", unit, _REPLACE)


async def _complete(link: Connection, unit: str) -> None:
    """Raises: HotplugError if the unit has failed."""
    ended: dict[str, str] = {}
    changed = asyncio.Event()

    def removed(message: Any) -> None:
        _, job, _, result = message.get_contents()
        ended[job] = result
        changed.set()

    _slot = await link.bus.match_signal_async(_SYSTEMD, *_MANAGER[1:], "JobRemoved", removed)
    await link.call(_MANAGER, "Subscribe")
    job = await link.call(_MANAGER, "StartUnit", "ss", unit, _REPLACE)
    lost = asyncio.ensure_future(link.lost.wait())
    try:
        while job not in ended:
            changed.clear()
            change = asyncio.ensure_future(changed.wait())
            await asyncio.wait({change, lost}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
            if lost.done():
                raise HotplugError("the bus has gone")
    finally:
        lost.cancel()
    if ended[job] != "done":
        raise HotplugError(f"the start ended with result {ended[job]!r}")
