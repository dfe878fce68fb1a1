"""Block devices: a monitor of their events, a look at all that are present, and what each is.

Facts come from two places. udev (or, without udevd, libblkid later) tells what the medium claims:
label, identifiers, serial number. sysfs tells what the kernel knows and is believed over any
event: a synthesized `remove` leaves the device in place.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import pyudev

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.model import (
    Appeared,
    Bus,
    DeviceNumber,
    DevType,
    Disappeared,
    Event,
    EventsLost,
    Sectors,
    Volume,
    VolumeId,
    number,
)

log = logging.getLogger(__name__)

Source = Literal["udev", "kernel"]

UDEV_PATIENCE_S = 30.0
"""How long udev may take over an event before a volume is served without it."""

_EVENTS_PER_READ: Final = 8
"""A storm must not keep the loop from everything else, such as the watchdog: to look at one device
takes dozens of calls."""
_NEVER_MEDIA: Final = re.compile(r"(dm-|md|ram|zram|sr|fd|nbd)\d")
"""Built on other devices, without partitions worth the name, or ours."""
_ATA: Final = re.compile(r"ata\d+")
_USED: Final = (
    "DISKSEQ", "ID_FS_LABEL", "ID_FS_LABEL_ENC", "ID_FS_UUID", "ID_FS_UUID_ENC", "ID_MODEL_ENC",
    "ID_PART_ENTRY_NAME", "ID_PART_ENTRY_TYPE", "ID_PART_ENTRY_UUID", "ID_PATH", "ID_SERIAL",
    "ID_SERIAL_SHORT", "ID_VENDOR_ENC", names.UDEV_OPT_OUT,
)  # fmt: skip
"""The properties that are looked at."""
_HEX: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")

_SYS_BLOCK: Final = Path("/sys/class/block")

_LISTEN_FDS_START: Final = 3
_TOLD_TO: Final[Mapping[int, Source]] = {1: "kernel", 2: "udev"}
"""Multicast groups of kobject-uevent (device-monitor.c in systemd)."""


def default_source() -> Source:
    """udev where udevd runs, else the kernel's own events."""
    return "udev" if names.UDEV_CONTROL.exists() else "kernel"


def _context() -> pyudev.Context:
    # pyudev asks ctypes.util.find_library, which starts ldconfig and may try gcc.
    import pyudev._ctypeslib.utils as loader  # noqa: PLC0415  pyudev offers no other seam

    loader.find_library = lambda name: f"lib{name}.so.1"
    return pyudev.Context()


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

    Where udev tells of them, the kernel is listened to as well. A medium that it has given up is
    gone, whatever udev still does with the event; and one that udev says nothing of, because udevd
    is dead or hangs, is served all the same after a while.

    Synchronization: loop thread only; libudev objects are not thread-safe.
    """

    def __init__(self, source: Source, handed: Mapping[Source, int] | None = None) -> None:
        """`handed`: sockets that are open already, by who tells there; ours from now on."""
        self.source: Final = source
        self._context = _context()
        sources: tuple[Source, ...] = ("kernel", "udev") if source == "udev" else ("kernel",)
        given = dict(handed or {})
        self._monitors = {
            name: _Monitor(self._context, name, given.pop(name, None)) for name in sources
        }
        for unused in given.values():
            os.close(unused)
        self._untold: dict[str, float] = {}
        """Until when udev should have told of devices that are there."""
        self._told: dict[str, VolumeId] = {}
        """The volume that was told of last, by the name where it sat."""

    def filenos(self) -> list[int]:
        """When one of them is readable, `read` has something to give."""
        return [monitor.fileno() for monitor in self._monitors.values()]

    def close(self) -> None:
        """Events are no longer received."""
        for monitor in self._monitors.values():
            monitor.close()

    def read(self) -> list[Event]:
        """The events that wait, a bounded number of them at a time."""
        events: list[Event] = []
        for source, monitor in self._monitors.items():
            for device in monitor.read():
                if device is None:
                    events.append(EventsLost())
                elif source == self.source:
                    events += self._events_of(device)
                else:
                    events += self._beforehand(device)
        return events

    def present(self) -> Iterator[Appeared]:
        """Every volume that is there now."""
        for device in self._context.list_devices(subsystem="block"):
            yield from (e for e in self._events_of(device) if isinstance(e, Appeared))

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
            volume = volume_at(name, {}, "kernel")
            if volume is not None:
                log.warning(
                    "udev has not told of %s for %g s; doing without", name, UDEV_PATIENCE_S
                )
                events.append(self._appeared(volume))
        return events

    def volume(self, node: str) -> Volume:
        """The volume at a device node, for people who ask about it.

        Raises: HotplugError if it is not there, or no block device.
        """
        try:
            Path(node).stat()
            device = pyudev.Devices.from_device_file(self._context, os.path.realpath(node))
        except FileNotFoundError as error:
            raise HotplugError(f"look at {node}: {error.strerror}") from error
        except (pyudev.DeviceNotFoundError, OSError, ValueError) as error:
            raise HotplugError(f"look at {node}: it is no block device") from error
        if _NEVER_MEDIA.match(device.sys_name):
            raise HotplugError(f"look at {node}: the agent leaves devices of this kind alone")
        found = volume_at(device.sys_name, _properties(device), self.source)
        if device.subsystem != "block" or found is None:
            raise HotplugError(f"look at {node}: it is no block device with a medium in it")
        return found

    def _events_of(self, device: pyudev.Device) -> Iterator[Event]:
        name = device.sys_name
        if _NEVER_MEDIA.match(name):
            return
        properties = _properties(device)
        volume = volume_at(name, properties, self.source)
        if volume is None:
            yield self._disappeared(name)
        elif device.action == "remove" or _is_of_another(properties, volume.id):
            # Synthesized, or of what sat here before: the event of what sits here now follows.
            return
        elif self.source == "kernel" or device.is_initialized:
            yield self._appeared(volume)
        else:
            self._await_udev(name)

    def _beforehand(self, device: pyudev.Device) -> Iterator[Event]:
        """What the kernel's event is good for before udev's, which follows."""
        name = device.sys_name
        if _NEVER_MEDIA.match(name):
            return
        which, told = present_id(name), self._told.get(name)
        if which is None or told not in {None, which}:
            yield self._disappeared(name)
        if which is not None and which != told:
            self._await_udev(name)

    def _appeared(self, volume: Volume) -> Appeared:
        self._untold.pop(volume.name, None)
        self._told[volume.name] = volume.id
        return Appeared(volume)

    def _disappeared(self, name: str) -> Disappeared:
        self._untold.pop(name, None)
        self._told.pop(name, None)
        return Disappeared(name)

    def _await_udev(self, name: str) -> None:
        self._untold.setdefault(name, time.monotonic() + UDEV_PATIENCE_S)


class _Monitor:
    """One netlink socket of events."""

    def __init__(self, context: pyudev.Context, source: Source, handed: int | None) -> None:
        self._monitor = pyudev.Monitor.from_netlink(context, source=source)
        self._monitor.start()
        if handed is not None:  # libudev takes no socket of others', but knows its own by number
            os.dup2(handed, self._monitor.fileno(), inheritable=False)
            os.close(handed)
        self._monitor.filter_by("block")
        # A second handle on the same socket, to clear an overflow that pyudev cannot.
        self._socket = socket.socket(fileno=os.dup(self._monitor.fileno()))

    def fileno(self) -> int:
        return int(self._monitor.fileno())

    def close(self) -> None:
        self._socket.close()

    def read(self) -> Iterator[pyudev.Device | None]:
        """The devices of the events that wait; None where some were lost.

        After an overflow (ENOBUFS) the socket reports an error until SO_ERROR is read.
        """
        for _ in range(_EVENTS_PER_READ):
            try:
                device = self._monitor.poll(timeout=0)
            except (OSError, ValueError, OverflowError, MemoryError):
                # pyudev turns EINVAL, EOVERFLOW and ENOMEM into those; errno is often None.
                self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                yield None
                continue
            if device is None:
                return
            yield device


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


def there() -> Iterator[Volume]:
    """The volumes that sysfs has, also those of which udev does not know anything yet."""
    for at in _SYS_BLOCK.iterdir():
        if not _NEVER_MEDIA.match(at.name):
            volume = volume_at(at.name, {}, "kernel")
            if volume is not None:
                yield volume


def present_id(name: str, sys_block: Path = _SYS_BLOCK) -> VolumeId | None:
    """Which volume sits at a kernel name now, or None. Asks sysfs; any thread."""
    folder = sys_block / name
    try:
        # The kernel takes the `dev` file away before it tells of the removal, the folder after
        # (device_del in drivers/base/core.c).
        DeviceNumber.from_text((folder / "dev").read_text())
        whole = not (folder / "partition").exists()
        disk = folder if whole else folder.resolve().parent
        diskseq = _number(disk / "diskseq")
        partition = 0 if whole else _number(folder / "partition")
        if _number(folder / "size") == 0:
            return None
    except (OSError, ValueError):
        return None
    return VolumeId(diskseq, partition)


def _number(file: Path) -> int:
    """Raises: OSError; ValueError if it holds anything but a number."""
    return number(file.read_text().removesuffix("\n"))


def volume_at(
    name: str, properties: Mapping[str, str], source: Source, sys_block: Path = _SYS_BLOCK
) -> Volume | None:
    """The volume at a kernel name, or None if there is none, or no medium in the reader."""
    folder = sys_block / name
    which = present_id(name, sys_block)
    if which is None:
        return None
    try:
        device = DeviceNumber.from_text((folder / "dev").read_text())
        size = Sectors(_number(folder / "size"))
        read_only = (folder / "ro").read_text().strip() == "1"
    except (OSError, ValueError):
        return None  # it left while we looked; its remove event follows
    disk = folder.resolve() if which.partition == 0 else folder.resolve().parent
    bus = _bus(disk)

    def text(key: str) -> str | None:
        value = properties.get(key)
        return None if value is None else decoded(value)

    return Volume(
        id=which,
        name=name,
        number=device,
        devtype=DevType.DISK if which.partition == 0 else DevType.PARTITION,
        size=size,
        bus=bus,
        removable=_is_removable(disk, bus),
        read_only=read_only or _attribute(disk / "ro") == "1",
        partlabel=text("ID_PART_ENTRY_NAME"),
        partuuid=text("ID_PART_ENTRY_UUID"),
        parttype=text("ID_PART_ENTRY_TYPE"),
        label=text("ID_FS_LABEL_ENC") or text("ID_FS_LABEL"),
        uuid=text("ID_FS_UUID_ENC") or text("ID_FS_UUID"),
        serial=text("ID_SERIAL_SHORT") or _serial(disk, text("ID_SERIAL")),
        vendor=(text("ID_VENDOR_ENC") or _attribute(disk / "device/vendor") or "").strip() or None,
        model=(text("ID_MODEL_ENC") or _model(disk) or "").strip() or None,
        path=text("ID_PATH"),
        opted_out=properties.get(names.UDEV_OPT_OUT) == "0",
        identified=source == "udev",
    )


def _attribute(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip() or None
    except OSError:
        return None


def _model(disk: Path) -> str | None:
    return _attribute(disk / "device/model") or _attribute(disk / "device/name")


def _is_removable(disk: Path, bus: Bus) -> bool:
    """Whether people plug it: the kernel's flag, or a bus whose disks mostly lack it.

    An SD card's flag is 0; so is an eMMC's, which is soldered on: its type is MMC, not SD.
    """
    if bus is Bus.MMC:
        return _attribute(disk / "device/type") == "SD"
    return bus is Bus.USB or _attribute(disk / "removable") == "1"


def _serial(disk: Path, otherwise: str | None) -> str | None:
    """The serial number where udev gives none of its own: an SD card's, a USB device's."""
    return (
        otherwise
        or _attribute(disk / "device/serial")
        or next((s for up in disk.parents if (s := _attribute(up / "serial"))), None)
    )


def _bus(disk: Path) -> Bus:
    """What the disk is attached to, from the subsystems above it, nearest first.

    A SCSI disk may really sit behind USB or ATA, so SCSI is the answer only if nothing else is.
    """
    if disk.name.startswith("loop"):
        return Bus.LOOP
    scsi = False
    for folder in disk.parents:
        if _ATA.fullmatch(folder.name):
            return Bus.ATA
        try:
            subsystem = (folder / "subsystem").readlink().name
        except OSError:
            continue
        match subsystem:
            case "usb" | "mmc" | "nvme":
                return Bus(subsystem)
            case "virtio" if not scsi:
                return Bus.VIRTIO
            case "scsi":
                scsi = True
    return Bus.SCSI if scsi else Bus.OTHER


def decoded(value: str) -> str:
    """A text that udev has encoded (`\\x2f` for a slash and so on), as it was.

    Source: encode_devnode_name in systemd, blkid_encode_string in libblkid.
    """
    raw = _HEX.sub(lambda m: bytes([int(m[1], 16)]), value.encode(errors="surrogateescape"))
    return raw.decode(errors="replace")
