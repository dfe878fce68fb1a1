"""Block devices: who tells of their events, and all that are present."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

import pyudev

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import device_users, sysfs, udev_rules, uevents
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
"""How long udev may take over an event before a volume is served without it."""

_EVENTS_PER_READ: Final = 8
"""A storm must not keep the loop from everything else, such as the watchdog: to look at one device
takes dozens of calls."""
_USED: Final = (
    "DISKSEQ", "ID_FS_LABEL", "ID_FS_LABEL_ENC", "ID_FS_UUID", "ID_FS_UUID_ENC", "ID_MODEL_ENC",
    "ID_PART_ENTRY_NAME", "ID_PART_ENTRY_TYPE", "ID_PART_ENTRY_UUID", "ID_PATH", "ID_SERIAL",
    "ID_SERIAL_SHORT", "ID_VENDOR_ENC", names.UDEV_OPT_OUT,
)  # fmt: skip
"""The properties that are looked at."""
_LISTEN_FDS_START: Final = 3
_TOLD_TO: Final[Mapping[int, Source]] = {
    uevents.KERNEL_GROUP: "kernel",
    uevents.UDEV_GROUP: "udev",
}


def default_source() -> Source:
    """udev where udevd runs, else the kernel's own events."""
    return "udev" if names.UDEV_CONTROL.exists() else "kernel"


def require_diskseq() -> None:
    """Raises: HotplugError if this kernel does not number insertions."""
    disks = list(Path("/sys/block").iterdir())
    if disks and not any((disk / "diskseq").exists() for disk in disks):
        raise HotplugError(
            "this kernel has no disk sequence numbers: Linux 5.15 or newer is needed"
        )


def handed_sockets() -> dict[Source, int]:
    """The sockets of events that the service manager has opened for us, by who tells there.

    The service has a network namespace of its own, where udev's events do not come, and not the
    right to buffers that a storm fits into; a socket keeps both from the process that made it.
    Source: sd_listen_fds(3); the variables are taken away as it says.
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
                if group in _TOLD_TO:
                    found[_TOLD_TO[group]] = opened.detach()
    return found


class Devices:
    """The block devices of this machine, and what happens to them.

    Where udev tells of them, the kernel is listened to as well. It announces a partition before
    udev has looked at it. A medium that it has given up is gone, whatever udev still does with the
    event; and one that udev says nothing of, because udevd is dead or hangs, is served all the
    same after a while.

    Synchronization: loop thread only; libudev objects are not thread-safe.
    """

    def __init__(
        self,
        source: Source,
        handed: Mapping[Source, int] | None = None,
        *,
        await_udev: bool = False,
    ) -> None:
        """`handed`: sockets that are open already, by who tells there; ours from now on.

        `await_udev`: nothing is announced before udev has told of it.
        """
        self.source: Final = source
        self._context = pyudev.Context()
        given = dict(handed or {})
        self._kernel = uevents.Uevents(uevents.KERNEL_GROUP, given.pop("kernel", None))
        self._udev = self._opt_outs = None
        if source == "udev":
            self._udev = uevents.Uevents(uevents.UDEV_GROUP, given.pop("udev", None))
            self._opt_outs = None if await_udev else udev_rules.OptOuts()
        for unused in given.values():
            os.close(unused)
        self._untold: dict[str, float] = {}
        """Until when udev should have told of devices that are there."""
        self._told: dict[str, VolumeId] = {}
        """The volume that was told of last, by the name where it sat."""

    def readers(self) -> dict[int, Callable[[], list[Event]]]:
        """What to call when which file descriptor is readable: a bounded number of events."""
        found = {self._kernel.fileno(): self.read_kernel}
        return found if self._udev is None else {**found, self._udev.fileno(): self.read_udev}

    def close(self) -> None:
        """Events are no longer received."""
        self._kernel.close()
        for opened in (self._udev, self._opt_outs):
            if opened is not None:
                opened.close()

    def prepare(self) -> None:
        """What is known of udev's rules the first medium need not wait for."""
        self._may_announce()

    def read_kernel(self) -> list[Event]:
        """What the kernel's events amount to that wait, a bounded number of them."""
        events: list[Event] = []
        for told in self._kernel.read(_EVENTS_PER_READ):
            events += [EventsLost()] if told is None else self._told_by_kernel(told)
        return events

    def read_udev(self) -> list[Event]:
        """What udev's events amount to that wait, a bounded number of them."""
        events: list[Event] = []
        for told in () if self._udev is None else self._udev.read(_EVENTS_PER_READ):
            events += [EventsLost()] if told is None else self._events_of(told)
        return events

    def present(self) -> Iterator[Appeared]:
        """Every volume that is there now."""
        for device in self._context.list_devices(subsystem="block"):
            told = uevents.Uevent("", device.sys_name, _properties(device))
            if self.source == "udev" and not device.is_initialized:
                self._await_udev(told.name)
            else:
                yield from (e for e in self._events_of(told) if isinstance(e, Appeared))

    @property
    def next_overdue(self) -> float | None:
        """On the monotonic clock, when `overdue` will have something to give; None if never."""
        return min(self._untold.values(), default=None)

    def overdue(self) -> list[Event]:
        """The volumes of which udev should have told by now, without what only udev knows."""
        events: list[Event] = []
        now = time.monotonic()
        for name in [name for name, at in self._untold.items() if at <= now]:
            del self._untold[name]
            if device_users.is_locked(name):  # then udev waits as well
                self._await_udev(name)
                continue
            volume = sysfs.volume_at(name, {}, "kernel")
            if volume is not None:
                log.warning(
                    "udev has not told of %s for %g s; doing without", name, UDEV_PATIENCE_S
                )
                events.append(self._appeared(volume))
        return events

    def volume(self, node: str) -> Volume:
        """The volume at a device node, for people who ask about it; identified if udev has told.

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
        told: Source = self.source if device.is_initialized else "kernel"
        found = sysfs.volume_at(device.sys_name, _properties(device), told)
        if device.subsystem != "block" or found is None:
            raise HotplugError(f"look at {node}: it is no block device with a medium in it")
        return found

    def _events_of(self, told: uevents.Uevent) -> Iterator[Event]:
        """All there is to know, from whoever tells all."""
        name, properties = told.name, told.properties
        if sysfs.NEVER_MEDIA.match(name):
            return
        volume = sysfs.volume_at(name, properties, self.source)
        if volume is None:
            yield self._disappeared(name)
        elif told.action != "remove" and not _is_of_another(properties, volume.id):
            # Else it is synthesized, or of what sat here before: what sits here now follows.
            yield self._appeared(volume)

    def _told_by_kernel(self, told: uevents.Uevent) -> Iterator[Event]:
        """What is known before udev tells, which follows."""
        name = told.name
        if self.source == "kernel":
            yield from self._events_of(told)
            return
        if sysfs.NEVER_MEDIA.match(name):
            return
        before, announced = self._told.get(name), None
        if told.action == "add" and before is None and self._may_announce():
            announced = sysfs.announced_at(name, told.properties.get("PARTNAME"))
        which = sysfs.present_id(name) if announced is None else announced.id
        if which is None or before not in {None, which}:
            yield self._disappeared(name)
        if which is not None and which != before:
            self._await_udev(name)
        if announced is not None:
            self._told[name] = announced.id
            yield Announced(announced)

    def _may_announce(self) -> bool:
        return self._opt_outs is not None and not self._opt_outs.may_be()

    def _appeared(self, volume: Volume) -> Appeared:
        self._untold.pop(volume.name, None)
        self._told[volume.name] = volume.id
        return Appeared(volume)

    def _disappeared(self, name: str) -> Disappeared:
        self._untold.pop(name, None)
        self._told.pop(name, None)
        return Disappeared(name)

    def _await_udev(self, name: str) -> None:
        if sysfs.NEVER_MEDIA.match(name):
            return
        self._untold.setdefault(name, time.monotonic() + UDEV_PATIENCE_S)


def _properties(device: pyudev.Device) -> dict[str, str]:
    """What udev or the kernel tells of the device, as far as it is text.

    Kernels before 6.4 tell a partition's name in bytes of no encoding (utf16_le_to_7bit in
    block/partitions/efi.c), at which pyudev raises for the one property and for all.
    """
    found = {}
    for name in _USED:
        with suppress(KeyError, UnicodeDecodeError):
            found[name] = device.properties[name]
    return found


def _is_of_another(properties: Mapping[str, str], which: VolumeId) -> bool:
    """Whether the properties are those of an earlier medium in the same place."""
    return properties.get("DISKSEQ", str(which.diskseq)) != str(which.diskseq)
