"""The running agent: everything put together, from start to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NoReturn

from caam_hotplug import trace
from caam_hotplug.config.loader import Config
from caam_hotplug.daemon import explain
from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.dbus.service import Service
from caam_hotplug.dbus.systemd_units import SystemdUnits
from caam_hotplug.errors import ConfigError, HotplugError, shown
from caam_hotplug.kernel import inotify, keyring, memory, sysfs, trusted, udev
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.model import Entry, Event
from caam_hotplug.systemd import journal
from caam_hotplug.systemd.notify import Notifier
from caam_hotplug.volume.leftovers import sweep
from caam_hotplug.volume.lifecycle import Context
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.worker import Threads, Worker

log = logging.getLogger(__name__)

_FIXED = ("source", "await_udev", "blob_directory", "mount_root", "stuck_after_s", "stop_within_s")
"""Keys of the configuration that are read at start only."""
_IDLE_THREADS = 2
"""Threads that stay for the next call: a volume's, and the mappings'."""
_STATUS_AFTER_S = 0.2
_BUS_WITHIN_S = 5.0
"""How long a start waits to be on the bus, so that who waits for it can ask it at once."""


Load = Callable[[], Config]


def run(load: Load) -> None:
    """The agent has run until SIGTERM or SIGINT, and let go of what its rules do not keep.

    `load` reads the configuration: now, and when the agent is told to reload.
    Raises: HotplugError if it cannot start.
    """
    config = load()
    if os.geteuid() != 0:
        raise HotplugError("run the agent: it needs to be root, to make mappings and mounts")
    udev.require_diskseq()
    os.umask(0o022)  # the mount root is for everyone to pass through
    _set_up_logging(config.log_level)
    memory.share_one_heap()
    memory.refuse_huge_pages()
    memory.refuse_core_dumps()  # key bytes pass through this process
    # Before any thread exists, since threads inherit the session keyring of their maker.
    keyring.join_session_keyring()
    with asyncio.Runner() as runner:
        runner.run(_serve(config, load))


async def _serve(config: Config, load: Load) -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)

    notifier, registry = Notifier(), StatusRegistry()
    source = udev.default_source() if config.source == "auto" else config.source

    def publish_soon(entry: Entry) -> None:
        """A turn of the loop later: the life's next step has begun then, and does not wait."""
        loop.call_soon(registry.publish, entry)

    threads = Threads(idle=_IDLE_THREADS)

    def new_worker(name: str) -> Worker:
        return Worker(name, config.stuck_after_s, threads)

    kernel = LinuxKernel(config.blob_directory, config.mount_root)
    context = Context(
        kernel=kernel,
        rules=config.rule,
        new_worker=new_worker,
        dm_worker=new_worker("mappings"),
        mount_points=MountPoints(),
        publish=publish_soon,
        units=SystemdUnits(),
    )

    registry.listen(_Status(notifier, registry).tell_soon)
    # Subscribed from here on: what is enumerated below is complete.
    devices = udev.Devices(source, udev.handed_sockets(), await_udev=config.await_udev)
    with ExitStack() as held:
        held.callback(devices.close)
        left = await sweep(kernel, new_worker("sweep"), context.dm_worker)
        # A key's type must be loaded before the key.
        await context.dm_worker.run(trusted.is_offered, late=lambda _why: None)
        async with Service(registry) as service, Supervisor(context, left) as supervisor:
            agent = Agent(config, load, supervisor, notifier)
            service.accept(supervisor, agent)
            loop.add_signal_handler(signal.SIGHUP, agent.reload_soon)
            events = _Events(devices, supervisor)
            held.callback(events.end)
            _watch_blobs(config.blob_directory, supervisor, held)
            events.begin()
            await service.first_attempt(_BUS_WITHIN_S)
            began = journal.event(journal.Event.STARTED)
            log.info("ready: %d rules, events from %s", len(config.rule), source, extra=began)
            notifier.send("READY=1", f"STATUS={registry.summary()}")
            watchdog = asyncio.create_task(_feed_watchdog(notifier))
            gc.collect()
            gc.freeze()  # what there is by now stays, and need not be looked through at each medium
            try:
                devices.prepare()
                await context.dm_worker.run(kernel.prepare, late=lambda _why: None)
                await stopped.wait()
                notifier.send("STOPPING=1")
                log.info("stopping", extra=journal.event(journal.Event.STOPPING))
                supervisor.stop()
                left_behind = await supervisor.ended(config.stop_within_s)
                if left_behind:
                    _give_up(left_behind, config.stop_within_s)
            finally:
                watchdog.cancel()
                with suppress(asyncio.CancelledError):
                    await watchdog
                supervisor.stop()
    log.info("stopped", extra=journal.event(journal.Event.STOPPED))


def _watch_blobs(directory: Path, supervisor: Supervisor, held: ExitStack) -> None:
    """Blobs that appear are told of, if the kernel has a watch left for that."""
    try:
        blobs = inotify.Directory(directory)
    except OSError as error:
        log.warning(
            "cannot watch %s for new blobs: %s; ask for `retry` when one has come",
            directory,
            error.strerror,
        )
        return
    loop = asyncio.get_running_loop()
    held.callback(blobs.close)
    loop.add_reader(blobs, _tell_of_blobs, blobs, supervisor)
    held.callback(loop.remove_reader, blobs)


def _tell_of_blobs(blobs: inotify.Directory, supervisor: Supervisor) -> None:
    for name in blobs.read():
        supervisor.blob_appeared(name)


class _Status:
    """The service's status line, which follows what it tells of within a moment."""

    def __init__(self, notifier: Notifier, registry: StatusRegistry) -> None:
        self._notifier = notifier
        self._registry = registry
        self._told: asyncio.TimerHandle | None = None

    def tell_soon(self, _entry: Entry) -> None:
        """The line is as the board is, soon; a medium comes to several states in a moment."""
        if self._told is None:
            self._told = asyncio.get_running_loop().call_later(_STATUS_AFTER_S, self._tell)

    def _tell(self) -> None:
        self._told = None
        self._notifier.send(f"STATUS={self._registry.summary()}")


class Agent:
    """What people may ask of the agent as a whole. Synchronization: loop only."""

    def __init__(
        self, config: Config, load: Load, supervisor: Supervisor, notifier: Notifier
    ) -> None:
        self._config = config
        self._load = load
        self._supervisor = supervisor
        self._notifier = notifier
        self._reloading: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def reload_soon(self) -> None:
        """Told by a signal, of which nobody waits for the outcome: the journal has it."""

        async def work() -> None:
            with suppress(HotplugError):
                await self.reload("SIGHUP")

        task = asyncio.create_task(work())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    async def reload(self, by: str) -> list[str]:
        """The rules in force are those of the files, also for present media.

        Returns: notices of what else was changed and has to wait for the next start.
        Raises: ConfigError naming every fault; the rules before stay in force.
        """
        event = journal.Event
        asked = journal.event(event.REQUESTED, request="reload", requested_by=by)
        log.info("reload asked for by %s", shown(by), extra=asked)
        async with self._turn:  # or an older reading of the files could come into force last
            return await self._reload()

    async def _reload(self) -> list[str]:
        event = journal.Event
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            config = await asyncio.to_thread(self._load)
            self._supervisor.renew(config.rule)
        except ConfigError as error:
            for fault in error.faults:
                log.error("%s", fault, extra=journal.event(event.CONFIG_REFUSED, reason=fault))
            refused = journal.event(event.CONFIG_REFUSED)
            log.error("the configuration is refused; the rules before stay in force", extra=refused)
            raise
        finally:
            self._notifier.send("READY=1")
        logging.getLogger("caam_hotplug").setLevel(config.log_level.upper())
        log.info("reloaded: %d rules", len(config.rule), extra=journal.event(event.RELOADED))
        notices = [
            f"{key} was changed and takes effect at the next start"
            for key in _FIXED
            if getattr(config, key) != getattr(self._config, key)
        ]
        for notice in notices:
            log.warning("%s", notice)
        return notices

    def explain(self, device: str) -> str:
        """As `caam-hotplug explain`, under the files' rules. Raises: HotplugError. Any thread."""
        return "\n".join(explain.explain(device, self._load()))


class _Events:
    """Hands the devices' events to the supervisor, as they come or when they are overdue."""

    def __init__(self, devices: udev.Devices, supervisor: Supervisor) -> None:
        self._devices = devices
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """All that is present has been told of, and what happens will be."""
        self._supervisor.start(self._devices.present(), sysfs.there())
        for fileno, read in self._devices.readers().items():
            self._loop.add_reader(fileno, self._take, read)
        self._set_alarm()

    def end(self) -> None:
        """Nobody listens to the devices any more."""
        for fileno in self._devices.readers():
            self._loop.remove_reader(fileno)
        if self._alarm is not None:
            self._alarm.cancel()

    def _take(self, read: Callable[[], list[Event]]) -> None:
        with trace.span("read events"):
            events = read()
        for event in events:
            with trace.span(f"take {type(event).__name__}"):
                self._supervisor.take(event, self._devices.present())
        self._set_alarm()

    def _look(self) -> None:
        self._alarm = None
        for event in self._devices.overdue():
            self._supervisor.take(event, ())
        self._set_alarm()

    def _set_alarm(self) -> None:
        at = self._devices.next_overdue
        if self._alarm is not None and at != self._alarm.when():
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and at is not None:
            self._alarm = self._loop.call_at(at, self._look)


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
        notifier.send("WATCHDOG=1")
        await asyncio.sleep(notifier.watchdog_s / 2)


def _set_up_logging(level: str) -> None:
    # Of a record only what is said is used (Optimization in Python's logging HOWTO).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    ours = logging.getLogger("caam_hotplug")
    ours.addHandler(journal.handler())
    ours.setLevel(level.upper())
