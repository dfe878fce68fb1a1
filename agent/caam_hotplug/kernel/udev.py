"""Block devices: their events, from the kernel and from udev, and those that are present."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

import pyudev

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import device_users, sysfs, udev_database, udev_rules, uevents
from caam_hotplug.kernel.sysfs import Source
from caam_hotplug.model import (
    Announced,
    Appeared,
    Disappeared,
    Event,
    EventsLost,
    Volume,
    VolumeId,
)

log = logging.getLogger(__name__)

UDEV_PATIENCE_S = 30.0
"""Time for udev to report an event; after it, a volume is served without udev's report."""

_EVENTS_PER_READ: Final = 8
"""A storm must not keep the loop from everything else, such as the watchdog: one device takes
dozens of calls."""
_LISTEN_FDS_START: Final = 3
_SOURCES: Final[Mapping[int, Source]] = {
    uevents.KERNEL_GROUP: "kernel",
    uevents.UDEV_GROUP: "udev",
}


def default_source() -> Source:
    """Return udev where udevd runs, else the kernel."""
    return "udev" if names.UDEV_CONTROL.exists() else "kernel"


def require_diskseq() -> None:
    """Raise HotplugError if this kernel does not number insertions."""
    disks = list(Path("/sys/block").iterdir())
    if disks and not any((disk / "diskseq").exists() for disk in disks):
        raise HotplugError(
            "this kernel has no disk sequence numbers: Linux 5.15 or newer is needed"
        )


def handed_sockets() -> dict[Source, int]:
    """Take over the event sockets that the service manager has opened, by their source.

    The service has a network namespace of its own, without udev's events, and no right to buffers
    that are large enough for a storm. A socket has both from the process that made it. Source:
    sd_listen_fds(3); the variables are removed as it says.
    """
    count, whose = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdecimal() or whose != str(os.getpid()):
        return {}
    found: dict[Source, int] = {}
    for fileno in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)):
        os.set_inheritable(fileno, False)
        os.set_blocking(fileno, False)
        with socket.socket(fileno=fileno) as opened:
            if opened.family == socket.AF_NETLINK:
                _, group = opened.getsockname()
                if group in _SOURCES:
                    found[_SOURCES[group]] = opened.detach()
    return found


class Devices:
    """The present block devices, and their events.

    Where udev is the source, the kernel's events are read, too. The kernel announces a partition
    before udev has read it. A medium that the kernel has removed is gone, whatever udev still does
    with the event. A medium that udev does not report, because udevd has ended or hangs, is served
    without it after UDEV_PATIENCE_S.

    Synchronization: loop thread only; libudev objects are not thread-safe.
    """

    def __init__(
        self,
        source: Source,
        handed: Mapping[Source, int] | None = None,
        *,
        await_udev: bool = False,
    ) -> None:
        """`handed`: open sockets by their source, which this object closes.

        `await_udev`: nothing is announced before udev has reported it.
        """
        self.source: Final = source
        self._context = pyudev.Context()
        given = dict(handed or {})
        self._kernel = uevents.Uevents(uevents.KERNEL_GROUP, given.pop("kernel", None))
        self._udev = self._rules = None
        if source == "udev":
            self._udev = uevents.Uevents(uevents.UDEV_GROUP, given.pop("udev", None))
            self._rules = None if await_udev else udev_rules.UdevRules()
        for unused in given.values():
            os.close(unused)
        self._awaited: dict[str, float] = {}
        """Deadlines for udev's reports of present devices, by their names."""
        self._reported: dict[str, VolumeId] = {}
        """The volume reported last, by its kernel name."""

    def readers(self) -> dict[int, Callable[[], list[Event]]]:
        """Return the functions to call when a descriptor is readable, by that descriptor."""
        found = {self._kernel.fileno(): self.read_kernel}
        return found if self._udev is None else {**found, self._udev.fileno(): self.read_udev}

    def close(self) -> None:
        """Stop receiving events."""
        self._kernel.close()
        for opened in (self._udev, self._rules):
            if opened is not None:
                opened.close()

    def prepare(self) -> None:
        """Read udev's rules, so that the first medium need not wait for it."""
        self._may_announce()

    def read_kernel(self) -> list[Event]:
        """Read a bounded number of the kernel's events."""
        events: list[Event] = []
        for uevent in self._kernel.read(_EVENTS_PER_READ):
            events += [EventsLost()] if uevent is None else self._from_kernel(uevent)
        return events

    def read_udev(self) -> list[Event]:
        """Read a bounded number of udev's events."""
        events: list[Event] = []
        for uevent in () if self._udev is None else self._udev.read(_EVENTS_PER_READ):
            events += [EventsLost()] if uevent is None else self._from_source(uevent)
        return events

    def present(self) -> Iterator[Appeared]:
        """Yield every present volume."""
        for device in self._context.list_devices(subsystem="block"):
            uevent = uevents.Uevent("", device.sys_name, udev_database.properties(device))
            if self.source == "udev" and not device.is_initialized:
                self._await_udev(uevent.name)
            else:
                events = [*self._from_source(uevent)] or self._without_database(uevent.name)
                yield from (e for e in events if isinstance(e, Appeared))

    def _without_database(self, name: str) -> Iterator[Event]:
        """Yield a medium of whose insertion udev's database does not know yet."""
        volume = None if sysfs.NEVER_MEDIA.match(name) else sysfs.volume_at(name, {}, "kernel")
        if volume is None:
            return
        if self.source == "kernel":
            yield self._appeared(volume)
            return
        self._await_udev(name)
        if volume.id.partition and self._may_announce():
            self._reported[name] = volume.id
            yield Appeared(replace(volume, awaits_udev=True))

    @property
    def next_overdue(self) -> float | None:
        """Return the monotonic time of the next deadline for udev; None without one."""
        return min(self._awaited.values(), default=None)

    def overdue(self) -> list[Event]:
        """Return the volumes that udev has not reported in time, without what only udev knows."""
        events: list[Event] = []
        now = time.monotonic()
        for name in [name for name, at in self._awaited.items() if at <= now]:
            del self._awaited[name]
            if device_users.is_locked(name):  # then udev waits as well
                self._await_udev(name)
                continue
            volume = sysfs.volume_at(name, {}, "kernel")
            if volume is not None:
                log.warning(
                    "udev has not reported %s for %g s; serving it without udev",
                    name,
                    UDEV_PATIENCE_S,
                )
                events.append(self._appeared(volume))
        return events

    def volume(self, node: str) -> Volume:
        """Return the volume at a device node; it is identified if udev has reported it.

        Raises: HotplugError if it is not there, or no block device.
        """
        try:
            Path(node).stat()
            device = pyudev.Devices.from_device_file(self._context, os.path.realpath(node))
        except FileNotFoundError as error:
            raise HotplugError(f"look at {node}: {error.strerror}") from error
        except (pyudev.DeviceNotFoundError, OSError, ValueError) as error:
            raise HotplugError(f"look at {node}: it is no block device") from error
        if sysfs.NEVER_MEDIA.match(device.sys_name):
            raise HotplugError(f"look at {node}: the agent leaves devices of this kind alone")
        source: Source = self.source if device.is_initialized else "kernel"
        properties = udev_database.properties(device)
        found = sysfs.volume_at(device.sys_name, properties, source)
        if found is not None and udev_database.is_of_another(properties, found.id):
            found = sysfs.volume_at(device.sys_name, {}, "kernel")
        if device.subsystem != "block" or found is None:
            raise HotplugError(f"look at {node}: it is no block device with a medium in it")
        return found

    def _from_source(self, uevent: uevents.Uevent) -> Iterator[Event]:
        """Yield the events of a uevent from the source."""
        name, properties = uevent.name, uevent.properties
        if sysfs.NEVER_MEDIA.match(name):
            return
        volume = sysfs.volume_at(name, properties, self.source)
        if volume is None:
            yield self._disappeared(name)
        elif uevent.action != "remove" and not udev_database.is_of_another(properties, volume.id):
            # Else it is synthesized, or an earlier medium's: that of the present one follows.
            yield self._appeared(volume)

    def _from_kernel(self, uevent: uevents.Uevent) -> Iterator[Event]:
        """Yield the events of a kernel's uevent; if udev is the source, its uevent follows."""
        name = uevent.name
        if self.source == "kernel":
            yield from self._from_source(uevent)
            return
        if sysfs.NEVER_MEDIA.match(name):
            return
        before, announced = self._reported.get(name), None
        if uevent.action == "add" and before is None and self._may_announce():
            announced = sysfs.announced_at(name, uevent.properties.get("PARTNAME"))
        which = sysfs.present_id(name) if announced is None else announced.id
        if which is None or before not in {None, which}:
            yield self._disappeared(name)
        if which is not None and which != before:
            self._await_udev(name)
        if announced is not None:
            self._reported[name] = announced.id
            yield Announced(announced)

    def _may_announce(self) -> bool:
        return self._rules is not None and not self._rules.may_opt_out()

    def _appeared(self, volume: Volume) -> Appeared:
        self._awaited.pop(volume.name, None)
        self._reported[volume.name] = volume.id
        return Appeared(volume)

    def _disappeared(self, name: str) -> Disappeared:
        self._awaited.pop(name, None)
        self._reported.pop(name, None)
        return Disappeared(name)

    def _await_udev(self, name: str) -> None:
        if sysfs.NEVER_MEDIA.match(name):
            return
        self._awaited.setdefault(name, time.monotonic() + UDEV_PATIENCE_S)
