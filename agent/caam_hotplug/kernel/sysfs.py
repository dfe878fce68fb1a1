"""The volume at a kernel name, and its facts.

Facts come from two sources. udev (or, without udevd, libblkid later) reports what the medium
claims: label, identifiers, serial number. sysfs has the kernel's own facts, which count more than
any event: a synthesized `remove` leaves the device in place.

It is read at every event, by the loop of a slow processor; so paths are texts here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal

from caam_hotplug import names
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId, number

Source = Literal["udev", "kernel"]
"""The sender of events."""

NEVER_MEDIA: Final = re.compile(r"(dm-|md|ram|zram|sr|fd|nbd)\d")
"""Built on other devices, without partitions worth the name, or ours."""
_ATA: Final = re.compile(r"ata\d+")
_HEX: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
_SYS_BLOCK: Final = "/sys/class/block"
_PAGE: Final = 4096
"""The most that an attribute has (sysfs.rst)."""


def there() -> Iterator[Volume]:
    """Yield the volumes in sysfs, also those that udev does not know yet."""
    for name in os.listdir(_SYS_BLOCK):
        if not NEVER_MEDIA.match(name):
            volume = volume_at(name, {}, "kernel")
            if volume is not None:
                yield volume


def present_id(name: str, sys_block: str = _SYS_BLOCK) -> VolumeId | None:
    """Return the volume that is at a kernel name now, or None. Any thread."""
    try:
        return _Place(name, sys_block).id
    except (OSError, ValueError):
        return None


def disk_name(name: str) -> str:
    """Return the kernel's name of a partition's disk, or a disk's own.

    Raises: OSError if it has gone.
    """
    folder = os.readlink(f"{_SYS_BLOCK}/{name}")
    is_partition = os.path.exists(f"{_SYS_BLOCK}/{name}/partition")
    return os.path.basename(os.path.dirname(folder) if is_partition else folder)


def announced_at(name: str, partlabel: str | None) -> Volume | None:
    """Return the partition that only the kernel has reported yet, or None if it has gone.

    The kernel's spelling of the label is not always the medium's.
    """
    if not os.path.exists(f"{_SYS_BLOCK}/{name}/partition"):
        return None
    volume = volume_at(name, {}, "kernel")
    return None if volume is None else replace(volume, partlabel=partlabel, awaits_udev=True)


def volume_at(
    name: str, properties: Mapping[str, str], source: Source, sys_block: str = _SYS_BLOCK
) -> Volume | None:
    """Return the volume at a kernel name; None without one, or without a medium in the reader."""

    def text(key: str) -> str | None:
        value = properties.get(key)
        return None if value is None else decoded(value)

    try:
        place = _Place(name, sys_block)
        disk = _disk(place.disk, place.id.diskseq)
        return place.volume(
            disk,
            partlabel=text("ID_PART_ENTRY_NAME"),
            partuuid=text("ID_PART_ENTRY_UUID"),
            parttype=text("ID_PART_ENTRY_TYPE"),
            label=text("ID_FS_LABEL_ENC") or text("ID_FS_LABEL"),
            uuid=text("ID_FS_UUID_ENC") or text("ID_FS_UUID"),
            serial=text("ID_SERIAL_SHORT") or text("ID_SERIAL") or disk.serial,
            vendor=_plain(text("ID_VENDOR_ENC") or disk.vendor),
            model=_plain(text("ID_MODEL_ENC") or disk.model),
            path=text("ID_PATH"),
            opted_out=properties.get(names.UDEV_OPT_OUT) == "0",
            identified=source == "udev",
        )
    except (OSError, ValueError):
        return None  # it left meanwhile; its remove event follows


class _Place:
    """A volume's place in sysfs."""

    def __init__(self, name: str, sys_block: str) -> None:
        """Raises: OSError; ValueError without a medium, or for a file that has no number."""
        folder = f"{sys_block}/{name}"
        # The kernel removes the `dev` file before it reports the removal, the folder after
        # (device_del in drivers/base/core.c).
        self._number = DeviceNumber.from_text(_text(f"{folder}/dev"))
        # A class's folder has links only, and they lead to where there are none (sysfs.rst).
        self._folder = os.path.normpath(f"{sys_block}/{os.readlink(folder)}")
        self._name = name
        try:
            partition = _number(f"{folder}/partition")
        except FileNotFoundError:
            self.disk, partition = self._folder, 0
        else:
            self.disk = os.path.dirname(self._folder)
        self.id = VolumeId(_number(f"{self.disk}/diskseq"), partition)
        self._size = Sectors(_number(f"{folder}/size"))
        if not self._size:
            raise ValueError("no medium is in the reader")

    def volume(self, disk: _Disk, **reported: Any) -> Volume:
        """Return the volume with the reported facts. Raises: OSError."""
        return Volume(
            id=self.id,
            name=self._name,
            number=self._number,
            devtype=DevType.DISK if self.id.partition == 0 else DevType.PARTITION,
            size=self._size,
            bus=disk.bus,
            removable=disk.removable,
            read_only=_is_set(f"{self._folder}/ro") or _attribute(f"{self.disk}/ro") == "1",
            **reported,
        )


@dataclass(frozen=True, slots=True)
class _Disk:
    """Facts of a disk that stay the same while it is present."""

    bus: Bus
    removable: bool
    serial: str | None
    vendor: str | None
    model: str | None


@lru_cache(maxsize=64)  # the kernel and udev each report a disk and its partitions
def _disk(folder: str, _diskseq: int) -> _Disk:
    bus = _bus(folder)
    return _Disk(
        bus=bus,
        removable=_is_removable(folder, bus),
        serial=_serial(folder),
        vendor=_attribute(f"{folder}/device/vendor"),
        model=_attribute(f"{folder}/device/model") or _attribute(f"{folder}/device/name"),
    )


def _text(file: str) -> str:
    """Read the file. Raises: OSError."""
    opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(opened, _PAGE).decode(errors="replace")
    finally:
        os.close(opened)


def _number(file: str) -> int:
    """Read a number. Raises: OSError; ValueError if the file has anything else."""
    return number(_text(file).removesuffix("\n"))


def _is_set(file: str) -> bool:
    """Return whether the file has a 1. Raises: OSError."""
    return _text(file).strip() == "1"


def _plain(text: str | None) -> str | None:
    return (text or "").strip() or None


def _attribute(file: str) -> str | None:
    try:
        return _plain(_text(file))
    except OSError:
        return None


def _is_removable(disk: str, bus: Bus) -> bool:
    """Return whether users plug it: by the kernel's flag, or a bus whose disks mostly lack it.

    An SD card's flag is 0; so is an eMMC's, which is soldered on: its type is MMC, not SD.
    """
    if bus is Bus.MMC:
        return _attribute(f"{disk}/device/type") == "SD"
    return bus is Bus.USB or _attribute(f"{disk}/removable") == "1"


def _serial(disk: str) -> str | None:
    """Return the serial number where udev reports none: an SD card's, a USB device's."""
    return _attribute(f"{disk}/device/serial") or next(
        (serial for up in _above(disk) if (serial := _attribute(f"{up}/serial"))), None
    )


def _above(folder: str) -> Iterator[str]:
    """Yield the folders above one, nearest first."""
    while (folder := os.path.dirname(folder)) != "/":
        yield folder


def _bus(disk: str) -> Bus:
    """Return the disk's bus, from the subsystems above it, nearest first.

    A SCSI disk may really sit behind USB or ATA, so SCSI is the answer only if nothing else is.
    """
    if os.path.basename(disk).startswith("loop"):
        return Bus.LOOP
    scsi = False
    for folder in _above(disk):
        if _ATA.fullmatch(os.path.basename(folder)):
            return Bus.ATA
        try:
            subsystem = os.path.basename(os.readlink(f"{folder}/subsystem"))
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
    """Decode a text that udev has encoded (`\\x2f` for a slash and so on).

    Source: encode_devnode_name in systemd, blkid_encode_string in libblkid.
    """
    if "\\" not in value and value.isascii():
        return value
    raw = _HEX.sub(lambda m: bytes([int(m[1], 16)]), value.encode(errors="surrogateescape"))
    return raw.decode(errors="replace")
