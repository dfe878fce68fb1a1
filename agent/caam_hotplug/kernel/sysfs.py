"""The volume at a kernel name, and its facts.

Facts come from two sources. udev (or, without udevd, libblkid later) reports what the medium
says: label, identifiers, serial number. sysfs has the kernel's own facts, which count more than
any event: a synthesized `remove` leaves the device in place.

What the kernel does not say is not known: every function here raises then, and only ENOENT, ENODEV
and ENXIO mean that a volume has gone.

It is read at every event, by the loop of a slow processor; so paths are texts here.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Final, Literal

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import sysfs_tree
from caam_hotplug.kernel.sysfs_tree import known
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId, number

Source = Literal["udev", "kernel"]
"""The sender of events."""

NEVER_MEDIA: Final = re.compile(r"(dm-|md|ram|zram|sr|fd|nbd)\d")
"""Built on other devices, without partitions worth the name, or ours."""
_ATA: Final = re.compile(r"ata\d+")
_HEX: Final = re.compile(rb"\\x([0-9a-fA-F]{2})")
_BLOCK: Final = "class/block"


def block_names(root: int | None = None) -> list[str]:
    """Return the kernel's names of all block devices. Raises: UnknownError."""
    at = sysfs_tree.root() if root is None else root
    return known("the block devices", lambda: sysfs_tree.names(at, _BLOCK)) or []


def require_diskseq() -> None:
    """Raise HotplugError if this kernel does not number insertions, or shows no sysfs."""
    at = sysfs_tree.root()
    disks = known("the block devices", lambda: sysfs_tree.names(at, "block")) or []
    if disks and not any(sysfs_tree.is_there(at, f"block/{disk}/diskseq") for disk in disks):
        raise HotplugError(
            "this kernel has no disk sequence numbers: Linux 5.15 or newer is needed"
        )


def there() -> Iterator[Volume]:
    """Yield the volumes in sysfs, also those that udev does not know yet. Raises: UnknownError."""
    for name in block_names():
        if not NEVER_MEDIA.match(name):
            volume = volume_at(name, {}, "kernel")
            if volume is not None:
                yield volume


def present_id(name: str, root: int | None = None) -> VolumeId | None:
    """Return the volume that is at a kernel name now, or None. Raises: UnknownError. Any thread."""
    return known(name, lambda: _Place(name, root).id)


def disk_name(name: str) -> str:
    """Return the kernel's name of a partition's disk, or a disk's own.

    Raises: OSError if it has gone, or is not known.
    """
    at = sysfs_tree.root()
    folder = sysfs_tree.link(at, f"{_BLOCK}/{name}")
    is_partition = sysfs_tree.is_there(at, f"{_BLOCK}/{name}/partition")
    return os.path.basename(os.path.dirname(folder) if is_partition else folder)


def announced_at(name: str, partlabel: str | None) -> Volume | None:
    """Return the partition that only the kernel has reported yet, or None if it has gone.

    The kernel's spelling of the label is not always the medium's. Raises: UnknownError.
    """
    at, file = sysfs_tree.root(), f"{_BLOCK}/{name}/partition"
    if not known(name, lambda: sysfs_tree.is_there(at, file)):
        return None
    volume = volume_at(name, {}, "kernel")
    return None if volume is None else replace(volume, partlabel=partlabel, awaits_udev=True)


def volume_at(
    name: str, properties: Mapping[str, str], source: Source, root: int | None = None
) -> Volume | None:
    """Return the volume at a kernel name; None without one, or without a medium in the reader.

    Raises: UnknownError if one of its facts cannot be read: a part of them is another volume's.
    """

    def text(key: str) -> str | None:
        value = properties.get(key)
        return None if value is None else decoded(value)

    def look() -> Volume:
        place = _Place(name, root)
        disk = _disk(place.root, place.disk, place.id.diskseq)
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

    return known(name, look)


class _Place:
    """A volume's place in sysfs."""

    def __init__(self, name: str, root: int | None) -> None:
        """Raises: OSError, ENXIO without a medium; ValueError for a file that has no number."""
        self.root = at = sysfs_tree.root() if root is None else root
        folder = f"{_BLOCK}/{name}"
        # The kernel removes this link and the `dev` file before it reports the removal, the folder
        # after (device_del in drivers/base/core.c). So a removal is seen without a descriptor. A
        # class's folder has links only, and they lead to where there are none (sysfs.rst).
        self._folder = os.path.normpath(f"{_BLOCK}/{sysfs_tree.link(at, folder)}")
        self._number = DeviceNumber.from_text(sysfs_tree.text(at, f"{folder}/dev"))
        self._name = name
        partition = _attribute(at, f"{self._folder}/partition")
        self.disk = self._folder if partition is None else os.path.dirname(self._folder)
        self.id = VolumeId(_number(at, f"{self.disk}/diskseq"), number(partition or "0"))
        self._size = Sectors(_number(at, f"{folder}/size"))
        if not self._size:
            raise OSError(errno.ENXIO, "no medium is in the reader")

    def volume(self, disk: _Disk, **reported: Any) -> Volume:
        """Return the volume with the reported facts. Raises: OSError."""
        volume = Volume(
            id=self.id,
            name=self._name,
            number=self._number,
            devtype=DevType.DISK if self.id.partition == 0 else DevType.PARTITION,
            size=self._size,
            bus=disk.bus,
            removable=disk.removable,
            read_only=self._is_read_only(),
            **reported,
        )
        # A file that was not there counts as a fact only if the device itself still is.
        sysfs_tree.link(self.root, f"{_BLOCK}/{self._name}")
        return volume

    def _is_read_only(self) -> bool:
        own = sysfs_tree.text(self.root, f"{self._folder}/ro").strip()
        return own == "1" or _attribute(self.root, f"{self.disk}/ro") == "1"


@dataclass(frozen=True, slots=True)
class _Disk:
    """Facts of a disk that stay the same while it is present."""

    bus: Bus
    removable: bool
    serial: str | None
    vendor: str | None
    model: str | None


@lru_cache(maxsize=64)  # the kernel and udev each report a disk and its partitions
def _disk(root: int, folder: str, _diskseq: int) -> _Disk:
    """Return the facts of a disk. Raises: OSError."""
    bus = _bus(root, folder)
    device = f"{folder}/device"
    return _Disk(
        bus=bus,
        removable=_is_removable(root, folder, bus),
        serial=_serial(root, folder),
        vendor=_attribute(root, f"{device}/vendor"),
        model=_attribute(root, f"{device}/model") or _attribute(root, f"{device}/name"),
    )


def _number(at: int, file: str) -> int:
    """Read a number. Raises: OSError; ValueError if the file has anything else."""
    return number(sysfs_tree.text(at, file).removesuffix("\n"))


def _plain(text: str | None) -> str | None:
    return (text or "").strip() or None


def _attribute(at: int, file: str) -> str | None:
    """Return the text of a file, None without it. Raises: OSError if it cannot be read."""
    try:
        return _plain(sysfs_tree.text(at, file))
    except OSError as error:
        if error.errno in sysfs_tree.ABSENT:
            return None
        raise


def _is_removable(at: int, disk: str, bus: Bus) -> bool:
    """Return whether users plug it: by the kernel's flag, or a bus whose disks mostly lack it.

    An SD card's flag is 0; so is an eMMC's, which is soldered on: its type is MMC, not SD.
    """
    if bus is Bus.MMC:
        return _attribute(at, f"{disk}/device/type") == "SD"
    return bus is Bus.USB or _attribute(at, f"{disk}/removable") == "1"


def _serial(at: int, disk: str) -> str | None:
    """Return the serial number where udev reports none: an SD card's, a USB device's."""
    return _attribute(at, f"{disk}/device/serial") or next(
        (serial for up in _above(disk) if (serial := _attribute(at, f"{up}/serial"))), None
    )


def _above(folder: str) -> Iterator[str]:
    """Yield the folders above one, nearest first."""
    while folder := os.path.dirname(folder):
        yield folder


def _bus(at: int, disk: str) -> Bus:
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
            subsystem = os.path.basename(sysfs_tree.link(at, f"{folder}/subsystem"))
        except OSError as error:
            if error.errno in sysfs_tree.ABSENT:
                continue
            raise
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
