"""Loop devices over memory: test volumes, which touch no file and no medium."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from caam_hotplug.model import SECTOR_BYTES, DeviceNumber, Sectors

_CONTROL: Final = Path("/dev/loop-control")
_CTL_GET_FREE: Final = 0x4C82
_CONFIGURE: Final = 0x4C0A
_FLAGS_AUTOCLEAR: Final = 4
_CONFIG: Final = struct.Struct("=II5Q4I64s64s32s2Q8Q")
"""struct loop_config of linux/loop.h: file, block size, struct loop_info64, eight reserved."""
_FREE_TRIES: Final = 16


@dataclass(frozen=True, slots=True)
class Memory:
    """A loop device over memory. Its descriptors belong to `over_memory`."""

    number: DeviceNumber
    size: Sectors
    file: int
    """The memory's descriptor, which shows the bytes below the device."""
    device: int
    """The device's descriptor, open for reading and writing."""


@contextmanager
def over_memory(name: str, size: Sectors) -> Iterator[Memory]:
    """Yield a loop device over memory, which the kernel removes with its last user.

    So it does, too, if this process is killed. `losetup` shows the name. Raises: OSError.
    """
    memory = os.memfd_create(name, os.MFD_CLOEXEC)
    try:
        os.ftruncate(memory, size * SECTOR_BYTES)
        device = _over(memory, name)
        try:
            status = os.fstat(device)
            number = DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))
            yield Memory(number, size, memory, device)
        finally:
            os.close(device)
    finally:
        os.close(memory)


def _over(file: int, name: str) -> int:
    """Open a free loop device with the file below it. Raises: OSError. Source: loop(4)."""
    wanted = bytearray(
        _CONFIG.pack(
            file, 0, 0, 0, 0, 0, 0, 0, 0, 0, _FLAGS_AUTOCLEAR, name.encode(), b"", b"", 0, 0,
            *(0,) * 8,
        )
    )  # fmt: skip
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_FREE_TRIES):
            which = fcntl.ioctl(control, _CTL_GET_FREE)
            device = os.open(f"/dev/loop{which}", os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(device, _CONFIGURE, wanted)
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:  # another was quicker
                    raise
            else:
                return device
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
