"""Disks that the kernel has taken offline: they are there, and all their I/O fails.

Nothing reports that: it has neither an event nor a poll (scsi_device_set_state in
drivers/scsi/scsi_lib.c). It may run again later. If the kernel asks a reader for its
card meanwhile, it counts as changed (sd_check_events in drivers/scsi/sd.c): the disk has
another sequence number. But nothing is written to it either, so that is no departure yet.
Source: sdev_states in drivers/scsi/scsi_sysfs.c, nvme_sysfs_show_state in drivers/nvme/host.
"""

from __future__ import annotations

import errno
from typing import Final

from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel import sysfs, sysfs_tree
from caam_hotplug.kernel.sysfs_tree import known
from caam_hotplug.model import VolumeId

_OFFLINE_WORDS: Final = "the kernel has taken the disk offline"
_OFFLINE: Final = {"offline", "transport-offline", "dead"}


def is_offline(name: str) -> bool:
    """Return whether the disk of this kernel name, or of this partition, is offline.

    One that has gone, or whose kind has no such state, is not. Raises: UnknownError. Any thread.
    """

    def state() -> str:
        disk = sysfs.disk_name(name)
        return sysfs_tree.text(sysfs_tree.root(), f"class/block/{disk}/device/state")

    return (known(name, state) or "").strip() in _OFFLINE


def require_known(name: str, before: VolumeId | None, now: VolumeId | None) -> None:
    """Require that a disk whose medium seems to be another is not offline.

    Raises: UnknownError: nothing is known of the medium then.
    """
    if None not in {before, now} and before != now and is_offline(name):
        raise UnknownError("look at", name, errno.EIO, _OFFLINE_WORDS)


def require_online(name: str) -> None:
    """Require that the disk is not offline. Raises: KernelError; UnknownError."""
    if is_offline(name):
        raise KernelError("use", f"/dev/{name}", errno.EIO, _OFFLINE_WORDS)
