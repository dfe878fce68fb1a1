"""What keeps a volume from being served, as far as the world can remove it."""

from __future__ import annotations

import errno
from enum import Flag, auto
from typing import Final

from caam_hotplug.errors import (
    BLOB_AT_FAULT,
    BlobMissingError,
    DeviceInUseError,
    DeviceLockedError,
    ForeignMappingError,
    MasterKeyError,
    MountError,
    MountPointOccupiedError,
    SuspendedError,
    UnsafePathError,
)
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import State

_IN_USE: Final = frozenset({errno.EEXIST, errno.EBUSY})
"""A mount's errors for a filesystem that is mounted already: another device of a btrfs with that
UUID (device_list_add in fs/btrfs/volumes.c), or this device in another way (get_tree_bdev)."""


class Obstacle(Flag):
    """What is in the way of an idle volume."""

    NONE = 0
    BLOB = auto()
    """Its blob is missing or wrong."""
    ANY_BLOB = auto()
    """A file of another name in the blob directory, or the owner or mode of a directory there."""
    MOUNT_POINT = auto()
    """Something has its mount point, or others could change the way there."""
    MOUNTED = auto()
    """Something else uses its device or its filesystem."""
    MAPPING = auto()
    """Its mapping is suspended, or has another table than its own."""


OF_BLOBS: Final = Obstacle.BLOB | Obstacle.ANY_BLOB
MAY_WANT_BLOB: Final = {State.WAITING, State.UNLOCKING, State.MOUNTING, State.CONFLICT}
"""States of a volume that waits for its blob, or may come to that."""
_BY_ERROR: Final = (
    (MasterKeyError, Obstacle.ANY_BLOB),
    (BLOB_AT_FAULT, Obstacle.BLOB),
    (MountPointOccupiedError, Obstacle.MOUNT_POINT),
    (DeviceLockedError, Obstacle.NONE),  # udev reports when it is not locked any more
    (DeviceInUseError, Obstacle.MOUNTED),
    ((ForeignMappingError, SuspendedError), Obstacle.MAPPING),
)
"""Of two that fit an error, the first counts."""


def obstacle_of(error: Exception, kernel: Kernel) -> Obstacle:
    """Return what must go so that another attempt need not fail with this error."""
    if isinstance(error, MountError) and error.errno in _IN_USE:
        return Obstacle.MOUNTED
    if isinstance(error, UnsafePathError):
        blobs = kernel.blob_directory
        is_blobs = error.component in {blobs, *blobs.parents}
        return Obstacle.ANY_BLOB if is_blobs else Obstacle.MOUNT_POINT
    found = (obstacle for kinds, obstacle in _BY_ERROR if isinstance(error, kinds))
    return next(found, Obstacle.NONE)


def state_of(error: BlobMissingError | MountPointOccupiedError) -> State:
    """Return the state of a volume that has not failed, but waits until this has ended."""
    return State.WAITING if isinstance(error, BlobMissingError) else State.CONFLICT
