"""A disk whose medium was changed while a partition of the old one was in use.

The kernel keeps the old partitions then, and reads the new table when the disk is opened next and
no partition is in use any more (GD_NEED_PART_SCAN in block/bdev.c, bdev_disk_changed in
block/partitions/core.c). It asks nobody to do that, and reports nothing.
"""

from __future__ import annotations

import os
from pathlib import Path

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import offline, sysfs_tree
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import DeviceNumber, VolumeId


def node(which: VolumeId, number: DeviceNumber, root: int | None = None) -> str | None:
    """Return the disk's node if another medium has the device number of this volume now.

    None also if the device has gone. Raises: UnknownError.
    """
    at = sysfs_tree.root() if root is None else root

    def look() -> str | None:
        disk = Path(os.path.normpath(f"dev/block/{sysfs_tree.link(at, f'dev/block/{number}')}"))
        if sysfs_tree.is_there(at, f"{disk}/partition"):
            disk = disk.parent
        is_another = int(sysfs_tree.text(at, f"{disk}/diskseq")) != which.diskseq
        return f"/dev/{disk.name}" if is_another else None

    return sysfs_tree.known(f"the disk of device {number}", look)


def read_table(disk: str) -> None:
    """Open the disk once, so that the kernel reads the table of its new medium.

    Raises: KernelError, also if it is offline. Blocks for I/O.
    """
    offline.require_online(disk.removeprefix("/dev/"))
    with reported_as("open", disk, KernelError):
        os.close(os.open(disk, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW))
