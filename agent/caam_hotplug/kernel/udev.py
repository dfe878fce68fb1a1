"""Block devices: their events, from the kernel and from udev, and those that are present."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

import pyudev

from caam_hotplug import names
from caam_hotplug.errors import HotplugError, UnknownError
from caam_hotplug.kernel import (
    device_users,
    sysfs,
    sysfs_tree,
    udev_database,
    udev_rules,
    uevents,
)
from caam_hotplug.kernel.sysfs import Source
from caam_hotplug.kernel.unknown import Unknown
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
_UDEV_DATA: Final = "/run/udev/data"
"""What udev has reported, in a file for each device (systemd's device-private.c)."""
_LISTING: Final = "the block devices"


def default_source() -> Source:
    """Return udev where udevd runs, else the kernel."""
    return "udev" if names.UDEV_CONTROL.exists() else "kernel"


def require_diskseq() -> None:
    """Raise HotplugError if this kernel does not number insertions, or shows no sysfs."""
    at = sysfs_tree.root()
    disks = sysfs_tree.known(_LISTING, lambda: sysfs_tree.names(at, "block")) or []
    if disks and not any(sysfs_tree.is_there(at, f"block/{disk}/diskseq") for disk in disks):
        raise HotplugError(
            "this kernel has no disk sequence numbers: Linux 5.15 or newer is needed"
        )


class Devices:
    """The present block devices, and their events.

    Where udev is the source, the kernel's events are read, too. The kernel announces a partition
    before udev has read it. A medium that the kernel has removed is gone, whatever udev still does
    with the event. A medium that udev does not report, because udevd has ended or hangs, is served
    without it after UDEV_PATIENCE_S. A device that cannot be looked at has neither come nor gone.

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
        self._unknown = Unknown()
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
            events += [EventsLost()] if uevent is None else self._taken("kernel", uevent)
        return events

    def read_udev(self) -> list[Event]:
        """Read a bounded number of udev's events."""
        events: list[Event] = []
        for uevent in () if self._udev is None else self._udev.read(_EVENTS_PER_READ):
            events += [EventsLost()] if uevent is None else self._taken("udev", uevent)
        return events

    def _taken(self, reporter: Source, uevent: uevents.Uevent) -> list[Event]:
        """Return the events of a uevent; what is not known now follows later, by `overdue`."""
        if sysfs.NEVER_MEDIA.match(uevent.name):
            return []
        check = self._from_kernel if reporter == "kernel" != self.source else self._from_source
        action = uevent.action
        # What an `add` says of a medium is not said again, and a `remove` may be synthesized.
        replaces = action == "add" or (reporter == "udev" and action != "remove")
        return self._unknown.check(uevent.name, reporter, partial(check, uevent), replaces=replaces)

    def present(self) -> Iterator[Appeared | Disappeared]:
        """Yield every present volume, and every name of before that has none now.

        What is not known now follows, by `overdue`.
        """
        names: list[str] = []

        def list_them() -> Iterator[Event]:
            names[:] = sysfs.block_names()
            yield EventsLost()  # so that all are looked at, if this is repeated

        self._unknown.check(_LISTING, "list", list_them)
        for name in dict.fromkeys([*names, *self._reported, *self._awaited]):
            if not sysfs.NEVER_MEDIA.match(name):
                events = self._unknown.check(name, "list", partial(self._listed, name))
                yield from (e for e in events if isinstance(e, Appeared | Disappeared))

    def _listed(self, name: str) -> Iterator[Event]:
        """Yield the event of a device that is listed, unless udev has yet to report it."""
        device = None
        with suppress(pyudev.DeviceNotFoundError):  # for whatever reason: libudev gives none
            device = pyudev.Devices.from_name(self._context, "block", name)
        if device is not None and (self.source == "kernel" or device.is_initialized):
            listed = uevents.Uevent("", name, udev_database.properties(device))
            yield from [*self._from_source(listed)] or self._without_database(name)
            return
        found = sysfs.volume_at(name, {}, "kernel")
        if found is None:
            yield self._disappeared(name)
            return
        self._await_udev(name)
        if device is None or os.path.exists(f"{_UDEV_DATA}/b{found.number}"):  # noqa: PTH110
            raise UnknownError("read udev's report of", name, errno.EAGAIN)

    def _without_database(self, name: str) -> Iterator[Event]:
        """Yield a medium of whose insertion udev's database does not know yet."""
        volume = sysfs.volume_at(name, {}, "kernel")
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
        """Return the monotonic time at which to call `overdue`; None while nothing is awaited."""
        return min([*self._awaited.values(), *self._unknown.times()], default=None)

    def overdue(self) -> list[Event]:
        """Return what has become known since it was asked, and what udev has not reported in time.

        The latter are volumes without what only udev knows.
        """
        events = self._unknown.again()
        now = time.monotonic()
        for name in [name for name, at in self._awaited.items() if at <= now]:
            self._awaited[name] = now + UDEV_PATIENCE_S
            events += self._unknown.check(name, "overdue", partial(self._without_udev, name))
        return events

    def _without_udev(self, name: str) -> Iterator[Event]:
        """Yield the volume without udev's report, unless that has come meanwhile."""
        if name not in self._awaited or device_users.is_locked(name):  # then udev waits as well
            return
        volume = sysfs.volume_at(name, {}, "kernel")
        if volume is None:
            del self._awaited[name]
            return
        log.warning(
            "udev has not reported %s for %g s; serving it without udev", name, UDEV_PATIENCE_S
        )
        yield self._appeared(volume)

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
        volume = sysfs.volume_at(name, properties, self.source)
        if volume is None:
            yield self._disappeared(name)
        elif uevent.action != "remove" and not udev_database.is_of_another(properties, volume.id):
            # Else it is synthesized, or an earlier medium's: that of the present one follows.
            yield self._appeared(volume)

    def _from_kernel(self, uevent: uevents.Uevent) -> Iterator[Event]:
        """Yield the events of a kernel's uevent, which udev's follows."""
        name = uevent.name
        before, announced = self._reported.get(name), None
        if uevent.action == "add" and before is None and self._may_announce():
            announced = sysfs.announced_at(name, uevent.properties.get("PARTNAME"))
        which = sysfs.present_id(name) if announced is None else announced.id
        if which is None or before not in {None, which}:
            yield self._disappeared(name)
        if which is not None:
            yield from self._replaced_by(name, which)
        if which is not None and which != before:
            self._await_udev(name)
        if announced is not None:
            self._reported[name] = announced.id
            yield Announced(announced)

    def _replaced_by(self, disk: str, which: VolumeId) -> Iterator[Event]:
        """Yield that the partitions of a disk's earlier medium have left.

        They may have been announced before udev has reported the disk.
        """
        for name, reported in list(self._reported.items()):
            if names.is_partition_of(name, disk) and reported.diskseq != which.diskseq:
                yield self._disappeared(name)

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
