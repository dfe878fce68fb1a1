"""A disk whose medium was changed while a partition of the old one was in use.

The kernel keeps the old partitions then, and reads the new table when the disk is opened next and
no partition is in use any more (GD_NEED_PART_SCAN in block/bdev.c, bdev_disk_changed in
block/partitions/core.c). It asks nobody to do that, and reports nothing.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import DeviceNumber, VolumeId

_BY_NUMBER: Final = Path("/sys/dev/block")


def node(which: VolumeId, number: DeviceNumber, by_number: Path = _BY_NUMBER) -> str | None:
    """Return the disk's node if another medium has the device number of this volume now.

    None also if the device has gone.
    """
    with suppress(OSError, ValueError):
        folder = (by_number / str(number)).resolve(strict=True)
        disk = folder.parent if (folder / "partition").exists() else folder
        if int((disk / "diskseq").read_text()) != which.diskseq:
            return f"/dev/{disk.name}"
    return None


def read_table(disk: str) -> None:
    """Open the disk once, so that the kernel reads the table of its new medium.

    Raises: KernelError. Blocks for I/O.
    """
    with reported_as("open", disk, KernelError):
        os.close(os.open(disk, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
