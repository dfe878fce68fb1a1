"""The composition of the agent, and its run from start to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager, closing, suppress
from typing import NoReturn

from caam_hotplug.config.loader import Config
from caam_hotplug.daemon import hand_over
from caam_hotplug.daemon.agent import Agent, Load
from caam_hotplug.daemon.events import (
    BlobEvents,
    DeviceEvents,
    MountChanges,
    sleeps_watched,
)
from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.dbus.service import Service
from caam_hotplug.dbus.systemd_units import SystemdUnits
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import keyring, memory, reserve, sysfs, trusted, udev, uevents
from caam_hotplug.kernel.agent_lock import AgentLock
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.model import Entry
from caam_hotplug.systemd import journal
from caam_hotplug.systemd.notify import Notifier
from caam_hotplug.volume.leftovers import find_leftovers
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.record import Context
from caam_hotplug.volume.worker import Observe, Threads, Worker, unobserved

log = logging.getLogger(__name__)

_IDLE_THREADS = 2
"""Threads that stay for the next call: a volume's, and the mappings'."""
_THREAD_WAITS_S = 0.0005
"""How long a thread waits for another one that computes. It waits so again after each call of the
kernel's in which the other has gone on, and an unmount has several (sys.setswitchinterval)."""
_STATUS_AFTER_S = 0.2
_BUS_WITHIN_S = 5.0
"""How long a start waits to be on the bus, so that clients that wait for it can ask it at once."""


def run(load: Load, observe: Observe = unobserved) -> None:
    """Run the agent until SIGTERM or SIGINT, and release what its rules do not keep.

    `load` reads the configuration: now, and at each reload. `observe` is called with everything
    that takes time. Raises: HotplugError if the agent cannot start.
    """
    config = load()
    if os.geteuid() != 0:
        raise HotplugError("run the agent: it needs to be root, to make mappings and mounts")
    with closing(AgentLock()):
        _run(config, load, observe)


def _run(config: Config, load: Load, observe: Observe) -> None:
    reserve.RESERVE.fill()
    sysfs.require_diskseq()
    hand_over.forget()
    os.umask(0o022)  # the mount root is for everyone to pass through
    _set_up_logging(config.log_level)
    sys.setswitchinterval(_THREAD_WAITS_S)
    memory.share_one_heap()
    memory.refuse_huge_pages()
    memory.refuse_core_dumps()  # key bytes pass through this process
    # Before any thread exists, since threads inherit the session keyring of their maker.
    keyring.join_session_keyring()
    with asyncio.Runner() as runner:
        runner.run(_serve(config, load, observe))


async def _serve(config: Config, load: Load, observe: Observe) -> None:
    loop, stopped = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    notifier, registry = Notifier(), StatusRegistry()
    registry.listen(_StatusLine(notifier, registry).update_soon)
    kernel = LinuxKernel(config.blob_directory, config.mount_root)
    context, threads = _new_context(kernel, config, registry, observe)
    service = Service(registry, threads.are_at_work)
    source = udev.default_source() if config.source == "auto" else config.source
    # Subscribed from here on: what is enumerated below is complete.
    devices = udev.Devices(source, uevents.handed_sockets(), await_udev=config.await_udev)
    with ExitStack() as held:
        held.callback(devices.close)
        worker = context.new_worker("leftovers")
        leftovers = await find_leftovers(kernel, worker, context.dm_worker)
        # A key's type must be loaded before the key.
        await context.dm_worker.run("load key types", trusted.is_offered, late=_ignore_late)
        async with service, Supervisor(context, leftovers) as supervisor:
            agent = Agent(config, load, supervisor, notifier, registry)
            service.accept(supervisor, agent)
            loop.add_signal_handler(signal.SIGHUP, agent.reload_soon)
            events = DeviceEvents(devices, supervisor, observe, context.new_worker)
            blobs = BlobEvents(config.blob_directory, supervisor)
            mounts = MountChanges(supervisor, blobs)
            for each in (events, blobs, mounts):
                held.callback(each.end)
            mounts.begin()
            blobs.begin()
            look_for_sleeps = held.enter_context(sleeps_watched(supervisor))
            events.begin()
            await service.first_attempt(_BUS_WITHIN_S)
            words = f"{len(config.rule)} rules, events from {source}"
            async with _ready(notifier, registry, words, look_for_sleeps):
                devices.prepare()
                await threads.prepare()
                await context.dm_worker.run("prepare", kernel.prepare, late=_ignore_late)
                await stopped.wait()
                await _stop(context, supervisor, notifier, config.stop_within_s)
    log.info("stopped", extra=journal.event(journal.Event.STOPPED))


@asynccontextmanager
async def _ready(
    notifier: Notifier, registry: StatusRegistry, words: str, at_ping: Callable[[], None]
) -> AsyncIterator[None]:
    """Report that the agent is ready, and ping the watchdog until the context ends.

    `at_ping` is called now and then, when the loop is awake anyway.
    """
    log.info("ready: %s", words, extra=journal.event(journal.Event.STARTED))
    notifier.send("READY=1", f"STATUS={registry.summary()}")
    watchdog = asyncio.create_task(_ping_watchdog(notifier, at_ping))
    gc.collect()
    gc.freeze()  # objects made until now stay, and need not be visited at each medium
    try:
        yield
    finally:
        watchdog.cancel()
        with suppress(asyncio.CancelledError):
            await watchdog


def _new_context(
    kernel: LinuxKernel, config: Config, registry: StatusRegistry, observe: Observe
) -> tuple[Context, Threads]:
    threads = Threads(idle=_IDLE_THREADS, observe=observe)

    def new_worker(name: str) -> Worker:
        return Worker(name, config.stuck_after_s, threads)

    context = Context(
        kernel=kernel,
        rules=config.rule,
        new_worker=new_worker,
        dm_worker=new_worker("mappings"),
        mount_points=MountPoints(),
        publish=registry.publish_soon,
        units=SystemdUnits(),
    )
    return context, threads


async def _stop(
    context: Context, supervisor: Supervisor, notifier: Notifier, within_s: float
) -> None:
    """Release the volumes; end the process if that takes too long."""
    notifier.send("STOPPING=1")
    log.info("stopping", extra=journal.event(journal.Event.STOPPING))
    context.keeps = await hand_over.keeps_media()
    supervisor.stop()
    unreleased = await supervisor.ended(within_s)
    if unreleased:
        _give_up(unreleased, within_s)


def _give_up(unreleased: list[str], within_s: float) -> NoReturn:
    """End the process: a call in the kernel cannot be cut short, and the loop would wait for it.

    The process is gone once its call in the kernel returns; some calls cannot even be killed.
    """
    for name in unreleased:
        log.error("%s: not released within %g s; left to the next start", name, within_s)
    os._exit(1)


class _StatusLine:
    """The status line of the service, updated a moment after the registry changes."""

    def __init__(self, notifier: Notifier, registry: StatusRegistry) -> None:
        self._notifier = notifier
        self._registry = registry
        self._timer: asyncio.TimerHandle | None = None
        self._said = ""

    def update_soon(self, _entry: Entry) -> None:
        """Update the line once for several changes: a medium has several states in a moment."""
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(_STATUS_AFTER_S, self._update)

    def _update(self) -> None:
        self._timer = None
        summary = self._registry.summary()
        if summary != self._said:
            self._said = summary
            self._notifier.send(f"STATUS={summary}")


async def _ping_watchdog(notifier: Notifier, at_ping: Callable[[], None]) -> None:
    """Ping the watchdog from the loop that does the work, so that it notices when that hangs."""
    while notifier.watchdog_s is not None:
        notifier.send("WATCHDOG=1")
        at_ping()
        await asyncio.sleep(notifier.watchdog_s / 2)


def _ignore_late(_why: str | None) -> None:
    """No volume waits for this call."""


def _set_up_logging(level: str) -> None:
    # Of a record only the message is used (Optimization in Python's logging HOWTO).
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    ours = logging.getLogger("caam_hotplug")
    ours.addHandler(journal.handler())
    ours.setLevel(level.upper())
