"""The flush of a whole disk: what the kernel and the disk itself have not written yet."""

from __future__ import annotations

import os
from typing import Final

from caam_hotplug.errors import KernelError, WritesLostError
from caam_hotplug.kernel import power
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.kernel.offline import require_online
from caam_hotplug.kernel.write_watch import NOT_ALL, NOT_KNOWN
from caam_hotplug.model import Volume

_WRITE_ALL: Final = 1 | 2 | 4
"""SYNC_FILE_RANGE_WAIT_BEFORE, _WRITE and _WAIT_AFTER of linux/fs.h."""


def flush(opened: int, disk: Volume) -> None:
    """Flush the disk's cache. Raises: WritesLostError; KernelError if that says nothing of it.

    A disk may report what it could not write once only, so a later flush says nothing either. One
    that was stopped, as by an earlier run that has ejected it, can be flushed again: it refuses all
    until it is started, and has written its cache before it stopped (SBC-4, 5.25).
    """
    require_online(disk.name)
    try:
        Libc.sync_file_range(opened, 0, 0, _WRITE_ALL)
        try:
            os.fsync(opened)
        except OSError:
            with power.started(opened, disk.node) as was_stopped:
                if not was_stopped:
                    raise
                os.fsync(opened)
    except OSError as error:
        failure = KernelError("flush", disk.node, error.errno or 0)
        if failure.errno in NOT_KNOWN:
            raise failure from error
        raise WritesLostError(f"{NOT_ALL}: {failure}") from error
