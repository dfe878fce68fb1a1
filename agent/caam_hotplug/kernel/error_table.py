"""Replaces a mapping's table by an error table, in any thread.

It must wait for nobody, so it does not run on the worker of libdevmapper, which is not thread-safe:
the kernel waits here for the I/O that the medium has not answered (dm_wait_for_completion in
drivers/md/dm.c), and for the medium to be closed.

The requests are struct dm_ioctl and struct dm_target_spec of linux/dm-ioctl.h.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from caam_hotplug.errors import DmError
from caam_hotplug.kernel.ctypes_lib import reported_as

_CONTROL: Final = "/dev/mapper/control"
_DEV_SUSPEND, _TABLE_LOAD, _TABLE_STATUS = 6, 9, 12
_HEADER: Final = struct.Struct("=3IIIIi3IQ128s129s7x")
_VERSION: Final = (4, 0, 0)
_SUSPENDED: Final = 1 << 1
_ACTIVE_PRESENT: Final = 1 << 5
_BUFFER_FULL: Final = 1 << 8
_SKIP_LOCKFS: Final = 1 << 10
_NOFLUSH: Final = 1 << 11
_TARGET: Final = struct.Struct("=QQiI16s")
_NO_PARAMETERS: Final = bytes(8)
_ROOM: Final = 16 << 10
"""For the answer: 341 targets, as much as libdevmapper gives. A mapping of the agent has one."""


@lru_cache(maxsize=1)
def _control() -> int:
    """Open device-mapper's control device, and keep it: later there may be no descriptor left."""
    return os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)


def prepare() -> None:
    """Open what `load` needs. Raises: DmError if there is no device-mapper. Any thread."""
    with reported_as("open", _CONTROL, DmError):
        _control()


def load(uuid: str) -> None:
    """Replace the live table of the mapping with this DM-UUID; the kernel wipes its key.

    What is in flight is not flushed, since its medium has gone. It is no error if there is no such
    mapping, if no table of it is live, or if the error table is there already. Raises: DmError.
    Any thread.
    """
    with reported_as("load error table of mapping", uuid, DmError):
        try:
            _load(uuid)
        except OSError as error:
            if error.errno != errno.ENXIO:  # find_device in dm-ioctl.c: it has been removed
                raise


def is_live(uuid: str) -> bool:
    """Return whether the live table is an error table, and is not suspended. Any thread.

    Raises: DmError, with ENXIO if there is no such mapping.
    """
    with reported_as("look at mapping", uuid, DmError):
        flags, targets = _status(uuid)
    is_running = bool(flags & _ACTIVE_PRESENT) and not flags & (_SUSPENDED | _BUFFER_FULL)
    return is_running and all(kind == b"error" for _, kind in targets)


def _load(uuid: str) -> None:
    flags, targets = _status(uuid)
    if not flags & _ACTIVE_PRESENT:
        return
    is_error = not flags & _BUFFER_FULL and all(kind == b"error" for _, kind in targets)
    if is_error and not flags & _SUSPENDED:
        return
    # Also if it is there, but suspended: it takes the place of a table that waits for the resume.
    size = max((1, *(end for end, _ in targets)))  # beyond its end a mapping fails I/O, too
    target = _TARGET.pack(0, size, 0, _TARGET.size + len(_NO_PARAMETERS), b"error")
    _call(_TABLE_LOAD, uuid, target + _NO_PARAMETERS, targets=1)
    # Suspends first what is live, unless it is suspended (do_resume in dm-ioctl.c).
    _call(_DEV_SUSPEND, uuid, flags=_NOFLUSH | _SKIP_LOCKFS)


def _status(uuid: str) -> tuple[int, list[tuple[int, bytes]]]:
    """Return the flags of a mapping; and where each target of its live table ends, and its kind.

    With the flag for a full buffer, which no error table has, the last targets are not among them.
    """
    answer = _call(_TABLE_STATUS, uuid, bytes(_ROOM))
    _, _, _, _, begin, count, _, flags, *_ = _HEADER.unpack_from(answer)
    return flags, list(_targets(answer, begin, count))


def _targets(answer: bytes, begin: int, count: int) -> Iterator[tuple[int, bytes]]:
    """Yield the targets that are in the answer. The kernel counts also those it has no room for.

    Source: retrieve_status in drivers/md/dm-ioctl.c. What it does not write stays zero.
    """
    at = begin
    for _ in range(count):
        if at + _TARGET.size > len(answer):
            return
        start, length, _, following, kind = _TARGET.unpack_from(answer, at)
        if not length:
            return
        yield start + length, kind.rstrip(b"\0")
        if not following:
            return
        at = begin + following


def _call(
    number: int, uuid: str, content: bytes = b"", *, flags: int = 0, targets: int = 0
) -> bytes:
    """Make a request about the mapping, and return the kernel's answer. Raises: OSError."""
    size = _HEADER.size + len(content)
    header = _HEADER.pack(
        *_VERSION, size, _HEADER.size, targets, 0, flags, 0, 0, 0, b"", uuid.encode()
    )
    request = bytearray(header + content)
    fcntl.ioctl(_control(), 3 << 30 | _HEADER.size << 16 | 0xFD << 8 | number, request)
    return bytes(request)
