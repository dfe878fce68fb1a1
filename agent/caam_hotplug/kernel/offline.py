"""Disks that the kernel has taken offline: they are there, and all their I/O fails.

Nothing reports that: it has neither an event nor a poll (scsi_device_set_state in
drivers/scsi/scsi_lib.c). Somebody may have the disk running again later.
Source: sdev_states in drivers/scsi/scsi_sysfs.c, nvme_sysfs_show_state in drivers/nvme/host.
"""

from __future__ import annotations

import errno
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import sysfs, sysfs_tree
from caam_hotplug.kernel.sysfs_tree import known
from caam_hotplug.model import Volume

_OFFLINE: Final = {"offline", "transport-offline", "dead"}


def is_offline(name: str) -> bool:
    """Return whether the disk of this kernel name, or of this partition, is offline.

    One that has gone, or whose kind has no such state, is not. Raises: UnknownError. Any thread.
    """

    def state() -> str:
        disk = sysfs.disk_name(name)
        return sysfs_tree.text(sysfs_tree.root(), f"class/block/{disk}/device/state")

    return (known(name, state) or "").strip() in _OFFLINE


def require_online(disk: Volume) -> None:
    """Require that the disk is not offline. Raises: KernelError; UnknownError."""
    if is_offline(disk.name):
        raise KernelError("flush", disk.node, errno.EIO, "the kernel has taken the disk offline")
