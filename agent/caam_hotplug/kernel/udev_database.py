"""What udev has in its database of a device, and of which insertion that is.

udevd writes it at each event of a device. If it was not there when a medium left and another came,
the database is of the first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from typing import Final

import pyudev

from caam_hotplug import names
from caam_hotplug.model import VolumeId

_USED: Final = (
    "DEVLINKS", "DISKSEQ", "ID_FS_LABEL", "ID_FS_LABEL_ENC", "ID_FS_UUID", "ID_FS_UUID_ENC",
    "ID_MODEL_ENC", "ID_PART_ENTRY_NAME", "ID_PART_ENTRY_TYPE", "ID_PART_ENTRY_UUID", "ID_PATH",
    "ID_SERIAL", "ID_SERIAL_SHORT", "ID_VENDOR_ENC", names.UDEV_DISKSEQ, names.UDEV_OPT_OUT,
)  # fmt: skip
"""The properties in use."""
_DISKSEQ_LINK: Final = re.compile(r"/dev/disk/by-diskseq/(\d+)")


def properties(device: pyudev.Device) -> dict[str, str]:
    """Return the properties in udev's database that are in use and are text.

    libudev adds those that the kernel has now. Of the insertion only our rule says which one the
    rest is of, or, without the rule, a disk's link (60-persistent-storage.rules).
    Kernels before 6.4 report a partition's name in bytes of no encoding (utf16_le_to_7bit in
    block/partitions/efi.c), at which pyudev raises for the one property and for all.
    """
    found = {}
    for name in _USED:
        with suppress(KeyError, UnicodeDecodeError):
            found[name] = device.properties[name]
    links = found.pop("DEVLINKS", "")
    found.pop("DISKSEQ", None)
    if names.UDEV_DISKSEQ not in found and (link := _DISKSEQ_LINK.search(links)):
        found[names.UDEV_DISKSEQ] = link[1]
    return found


def is_of_another(properties: Mapping[str, str], which: VolumeId) -> bool:
    """Return whether the properties are those of an earlier medium in the same place."""
    said = (properties.get(name) for name in ("DISKSEQ", names.UDEV_DISKSEQ))
    return any(number not in {None, str(which.diskseq)} for number in said)
