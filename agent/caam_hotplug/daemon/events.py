"""Hands the events of devices and blobs to the supervisor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import inotify, sysfs, udev, wakeups
from caam_hotplug.model import Event
from caam_hotplug.volume.worker import Observe

log = logging.getLogger(__name__)


class DeviceEvents:
    """Takes the events of devices as they come, or when udev's report is overdue."""

    def __init__(self, devices: udev.Devices, supervisor: Supervisor, observe: Observe) -> None:
        self._devices = devices
        self._supervisor = supervisor
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the lifecycles of all present volumes, and take events from now on."""
        self._supervisor.start(self._devices.present(), sysfs.there())
        for fileno, read in self._devices.readers().items():
            self._loop.add_reader(fileno, self._take, read)
        self._set_alarm()

    def end(self) -> None:
        """Take no more events."""
        for fileno in self._devices.readers():
            self._loop.remove_reader(fileno)
        if self._alarm is not None:
            self._alarm.cancel()

    def _take(self, read: Callable[[], list[Event]]) -> None:
        with self._observe("read events"):
            events = read()
        for event in events:
            with self._observe(f"take {type(event).__name__}"):
                self._supervisor.take(event, self._devices.present())
        self._set_alarm()

    def _take_overdue(self) -> None:
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
            self._alarm = self._loop.call_at(at, self._take_overdue)


@contextmanager
def blobs_watched(directory: Path, supervisor: Supervisor) -> Iterator[None]:
    """Report new blobs to the supervisor, if the kernel has an inotify watch left for that."""
    try:
        blobs = inotify.Directory(directory)
    except OSError as error:
        log.warning(
            "cannot watch %s for new blobs: %s; ask for `retry` when one has come",
            directory,
            error.strerror,
        )
        yield
        return

    def take() -> None:
        for name in blobs.read():
            supervisor.blob_appeared(name)

    loop = asyncio.get_running_loop()
    loop.add_reader(blobs, take)
    try:
        yield
    finally:
        loop.remove_reader(blobs)
        blobs.close()


@contextmanager
def sleeps_watched(supervisor: Supervisor) -> Iterator[Callable[[], None]]:
    """Report each sleep of the machine; what is yielded reports one that the clock did not show."""
    try:
        watched = wakeups.Wakeups()
    except (HotplugError, OSError) as error:
        log.warning("cannot notice that the machine has slept: %s", error)
        yield lambda: None
        return

    def take() -> None:
        if watched.read():
            supervisor.machine_woke()

    def look() -> None:
        if watched.counts_another():
            supervisor.machine_woke()

    loop = asyncio.get_running_loop()
    loop.add_reader(watched, take)
    try:
        yield look
    finally:
        loop.remove_reader(watched)
        watched.close()
