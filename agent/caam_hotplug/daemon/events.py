"""Hands the events of devices and blobs to the supervisor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

from caam_hotplug.daemon.readers import Readers
from caam_hotplug.daemon.retries import Retries
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import HotplugError, UnknownError
from caam_hotplug.kernel import inotify, sysfs, udev, wakeups
from caam_hotplug.kernel.mount_events import MountEvents
from caam_hotplug.kernel.sysfs import Source
from caam_hotplug.kernel.uevents import Uevent
from caam_hotplug.model import Event
from caam_hotplug.volume.worker import Observe, Worker

log = logging.getLogger(__name__)
T = TypeVar("T")


class DeviceEvents:
    """Takes the events of devices as they come, or when udev's report is overdue."""

    def __init__(
        self,
        devices: udev.Devices,
        supervisor: Supervisor,
        observe: Observe,
        new_worker: Callable[[str], Worker],
    ) -> None:
        self._devices = devices
        self._readers = Readers(devices.source, supervisor, new_worker, self._look_at)
        self._supervisor = supervisor
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._alarm: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Start the lifecycles of all present volumes, and take events from now on."""
        self._devices.watch_mappings(self._supervisor.observer.mapping_changed)
        self._devices.watch_disks(self._disk_reported)
        self._supervisor.start(self._devices.present(), sysfs.there())
        for fileno, read in self._devices.readers().items():
            self._loop.add_reader(fileno, self._take, read)
        self._readers.begin()
        self._set_alarm()

    def end(self) -> None:
        """Take no more events."""
        self._readers.end()
        for fileno in self._devices.readers():
            self._loop.remove_reader(fileno)
        if self._alarm is not None:
            self._alarm.cancel()

    def _disk_reported(self, reporter: Source, uevent: Uevent) -> None:
        self._readers.reported(reporter, uevent)
        if uevent.properties.get("DISK_MEDIA_CHANGE") == "1":
            self._supervisor.observer.disk_changed(uevent.name)

    def _take(self, read: Callable[[], list[Event]]) -> None:
        with self._observe("read events"):
            events = read()
        for event in events:
            with self._observe(f"take {type(event).__name__}"):
                self._supervisor.take(event, self._devices.present())
        self._set_alarm()

    def _look_at(self, name: str) -> None:
        self._take(partial(self._devices.look_at, name))

    def _take_overdue(self) -> None:
        self._alarm = None
        with self._observe("look at devices again"):
            events = self._devices.overdue()
        for event in events:
            self._supervisor.take(event, self._devices.present())
        self._set_alarm()

    def _set_alarm(self) -> None:
        at = self._devices.next_overdue
        if self._alarm is not None and at != self._alarm.when():
            self._alarm.cancel()
            self._alarm = None
        if self._alarm is None and at is not None:
            self._alarm = self._loop.call_at(at, self._take_overdue)


class BlobEvents:
    """Takes new blobs as they come. While the kernel gives no watch, it is asked for one again."""

    def __init__(self, directory: Path, supervisor: Supervisor) -> None:
        self._directory = directory
        self._supervisor = supervisor
        self._loop = asyncio.get_running_loop()
        self._watch: inotify.Directory | None = None
        self._retries = Retries(self.begin)

    def begin(self) -> None:
        """Watch the directory from now on."""
        try:
            self._watch = watch = inotify.Directory(self._directory)
        except UnknownError as error:
            self._ask_again(error)
            return
        self._loop.add_reader(watch, self._take, watch)
        if self._retries.succeeded():
            log.info("watch %s: the kernel watches it again", self._directory)
            self._supervisor.blob_appeared(None)  # one may have come meanwhile

    def mounts_changed(self) -> None:
        """Look whether a mount has put another directory in its place; no watch reports that."""
        if self._watch is not None and self._ask(self._watch.leads_elsewhere):
            self._supervisor.blob_appeared(None)

    def end(self) -> None:
        """Watch no more."""
        self._retries.end()
        if self._watch is not None:
            self._loop.remove_reader(self._watch)
            self._watch.close()
            self._watch = None

    def _take(self, watch: inotify.Directory) -> None:
        for name in self._ask(watch.read) or ():
            self._supervisor.blob_appeared(name)

    def _ask(self, question: Callable[[], T]) -> T | None:
        """Return the answer of the watch; without one, end the watch and ask for another."""
        try:
            return question()
        except UnknownError as error:
            self.end()
            self._ask_again(error)
            return None

    def _ask_again(self, error: UnknownError) -> None:
        if self._retries.failed():
            words = "%s; until that is possible, ask for `retry` when a blob has come"
            log.warning(words, error)


class MountChanges:
    """Takes changes of the machine's mounts. While the kernel gives no watch, it is asked again."""

    def __init__(self, supervisor: Supervisor, blobs: BlobEvents) -> None:
        self._supervisor = supervisor
        self._blobs = blobs
        self._loop = asyncio.get_running_loop()
        self._watch: MountEvents | None = None
        self._retries = Retries(self.begin)

    def begin(self) -> None:
        """Watch the mounts from now on."""
        try:
            self._watch = watch = MountEvents()
        except UnknownError as error:
            if self._retries.failed():
                words = "%s; until that is possible, what others do with a mount is seen late"
                log.warning(words, error)
            return
        self._loop.add_reader(watch, self._take, watch)
        if self._retries.succeeded():
            log.info("watch the mounts: the kernel watches them again")
            self._take(watch)  # there may have been changes meanwhile

    def end(self) -> None:
        """Watch no more."""
        self._retries.end()
        if self._watch is not None:
            self._loop.remove_reader(self._watch)
            self._watch.close()
            self._watch = None

    def _take(self, watch: MountEvents) -> None:
        watch.read()
        self._supervisor.mounts_changed()
        self._blobs.mounts_changed()


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
