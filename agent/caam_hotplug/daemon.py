"""The running agent: everything put together, from start to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from contextlib import suppress
from typing import ClassVar, NoReturn

from caam_hotplug.board import Board, Entry
from caam_hotplug.config import Config
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import keyring, memory, udev
from caam_hotplug.kernel.linux import Linux
from caam_hotplug.lifecycle.claims import Claims
from caam_hotplug.lifecycle.lane import Lane
from caam_hotplug.lifecycle.life import Surroundings
from caam_hotplug.lifecycle.sweep import sweep
from caam_hotplug.notify import Notifier
from caam_hotplug.supervisor import Supervisor

log = logging.getLogger(__name__)


def run(config: Config) -> None:
    """The agent has run until SIGTERM or SIGINT, and let go of what its rules do not keep.

    Raises: HotplugError if it cannot start.
    """
    if os.geteuid() != 0:
        raise HotplugError("run the agent: it needs to be root, to make mappings and mounts")
    udev.require_diskseq()
    os.umask(0o022)  # the mount root is for everyone to pass through
    _set_up_logging(config.log_level)
    memory.refuse_core_dumps()  # key bytes pass through this process
    # Before any thread exists, since threads inherit the session keyring of their maker.
    keyring.join_session_keyring()
    with asyncio.Runner() as runner:
        runner.run(_serve(config))


async def _serve(config: Config) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)

    notifier, board = Notifier(), Board()
    source = udev.default_source() if config.source == "auto" else config.source

    def new_lane(name: str) -> Lane:
        return Lane(name, config.stuck_after_s)

    around = Surroundings(
        host=Linux(config.blob_directory, config.mount_root),
        rules=config.rule,
        new_lane=new_lane,
        dm_lane=new_lane("mappings"),
        claims=Claims(),
        publish=board.publish,
    )

    def tell_status(_entry: Entry) -> None:
        notifier.tell(f"STATUS={board.summary()}")

    board.listen(tell_status)
    # Subscribed from here on: what is enumerated below is complete.
    devices = udev.Devices(source, udev.handed_sockets())
    try:
        left = await sweep(around.host, new_lane("sweep"), around.dm_lane)
        async with Supervisor(around, left) as supervisor:
            events = _Events(devices, supervisor)
            events.begin()
            log.info("ready: %d rules, events from %s", len(config.rule), source)
            notifier.tell("READY=1", f"STATUS={board.summary()}")
            watchdog = asyncio.create_task(_feed_watchdog(notifier))
            try:
                await stopped.wait()
                notifier.tell("STOPPING=1")
                log.info("stopping")
                supervisor.stop()
                held = await supervisor.ended(config.stop_within_s)
                if held:
                    _give_up(held, config.stop_within_s)
            finally:
                watchdog.cancel()
                with suppress(asyncio.CancelledError):
                    await watchdog
                supervisor.stop()
    finally:
        for fileno in devices.filenos():
            loop.remove_reader(fileno)
        devices.close()
    log.info("stopped")


class _Events:
    """Hands the devices' events to the supervisor, as they come or when they are overdue."""

    def __init__(self, devices: udev.Devices, supervisor: Supervisor) -> None:
        self._devices = devices
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """All that is present has been told of, and what happens will be."""
        self._supervisor.start(self._devices.present(), udev.there())
        for fileno in self._devices.filenos():
            self._loop.add_reader(fileno, self._read)
        self._set_alarm()

    def _read(self) -> None:
        for event in self._devices.read():
            self._supervisor.take(event, self._devices.present())
        self._set_alarm()

    def _look(self) -> None:
        for event in self._devices.overdue():
            self._supervisor.take(event, ())
        self._set_alarm()

    def _set_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        at = self._devices.next_overdue
        self._alarm = None if at is None else self._loop.call_at(at, self._look)


def _give_up(held: list[str], within_s: float) -> NoReturn:
    """Ends the process: a call in the kernel cannot be cut short, and the loop would wait for it.

    The process is gone once the kernel lets go of it; some calls cannot even be killed.
    """
    for what in held:
        log.error("%s: not let go within %g s; left to the next start", what, within_s)
    os._exit(1)


async def _feed_watchdog(notifier: Notifier) -> None:
    """The loop that does the work is what keeps the watchdog quiet."""
    while notifier.watchdog_s is not None:
        notifier.tell("WATCHDOG=1")
        await asyncio.sleep(notifier.watchdog_s / 2)


class _JournalFormatter(logging.Formatter):
    """A line with its priority before it, as the journal reads it (sd-daemon(3))."""

    _PRIORITIES: ClassVar = {
        logging.ERROR: 3,
        logging.WARNING: 4,
        logging.INFO: 6,
        logging.DEBUG: 7,
    }

    def format(self, record: logging.LogRecord) -> str:
        return f"<{self._PRIORITIES.get(record.levelno, 5)}>{super().format(record)}"


def _set_up_logging(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    if "JOURNAL_STREAM" in os.environ:
        handler.setFormatter(_JournalFormatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s"))
    ours = logging.getLogger("caam_hotplug")
    ours.addHandler(handler)
    ours.setLevel(level.upper())
