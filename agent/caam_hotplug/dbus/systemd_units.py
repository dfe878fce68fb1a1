"""Starts units of the service manager over the system bus, and asks for the agent's own job.

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

    Work = Callable[[Connection, str], Coroutine[Any, Any, Any]]

log = logging.getLogger(__name__)

_SYSTEMD: Final = "org.freedesktop.systemd1"
_MANAGER: Final = (_SYSTEMD, "/org/freedesktop/systemd1", f"{_SYSTEMD}.Manager")
SHUTDOWN: Final = "shutdown"
"""What `own_job` returns while the machine goes down."""
_UNIT, _JOB = f"{_SYSTEMD}.Unit", f"{_SYSTEMD}.Job"


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


async def own_job(within_s: float) -> str:
    """Return the type of the job that the unit of this process has, such as `stop` or `restart`.

    It is `SHUTDOWN` while the machine goes down, and empty without a job or if the service manager
    does not answer in time.
    """
    try:
        async with asyncio.timeout(within_s):
            return str(await _with_connection("", _ask_for_job))
    except (HotplugError, OSError, TimeoutError) as error:
        log.debug("ask for the job of the agent: %s", error)
        return ""


async def _with_connection(unit: str, work: Work) -> Any:
    """Raises: HotplugError."""
    try:
        import sdbus  # noqa: PLC0415  an extra

        from caam_hotplug.dbus import connection, relay  # noqa: PLC0415
    except ImportError as error:
        raise HotplugError(f"{error}; install sdbus (the extra `dbus`)") from error
    link = connection.Connection(relay.OF_UNITS)
    try:
        return await work(link, unit)
    except sdbus.SdBusBaseError as error:
        raise HotplugError(connection.error_message(error)) from error
    finally:
        link.close()


async def _ask_for_job(link: Connection, _unit: str) -> str:
    if await _goes_down(link):
        return SHUTDOWN
    own = await link.call(_MANAGER, "GetUnitByPID", "u", 0)  # which stands for the caller
    number, job = (await _property(link, own, _UNIT, "Job"))[1]
    return str((await _property(link, job, _JOB, "JobType"))[1]) if number else ""


async def _goes_down(link: Connection) -> bool:
    _, path, manager = _MANAGER
    _, state = await _property(link, path, manager, "SystemState")
    return bool(state == "stopping")


async def _property(link: Connection, path: str, interface: str, name: str) -> Any:
    target = (_SYSTEMD, path, "org.freedesktop.DBus.Properties")
    return await link.call(target, "Get", "ss", interface, name)


async def _begin(link: Connection, unit: str) -> Any:
    """Start the unit, also while the machine goes down, and return the job.

    What a unit needs at its start, such as sysinit.target, is being stopped then. To start it
    would be refused, or would cancel the jobs of a shutdown (transaction.c of systemd).
    """
    mode = "ignore-dependencies" if await _goes_down(link) else "replace"
    return await link.call(_MANAGER, "StartUnit", "ss", unit, mode)


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
    job = await _begin(link, unit)
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
