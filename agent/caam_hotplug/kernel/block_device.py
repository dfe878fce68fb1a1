"""What the kernel answers about an open block device, and does with it."""

from __future__ import annotations

import errno
import fcntl
import struct
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import reported_as

_BLKRRPART: Final = 0x125F
_BLKSSZGET: Final = 0x1268
_BLKGETDISKSEQ: Final = 0x80081280
"""From linux/fs.h, since Linux 5.15."""


def is_another(node: str) -> KernelError:
    """Return the error for a node that another medium has now."""
    return KernelError("use", node, errno.ENODEV, "another medium has its place")


def require_diskseq(file: int, node: str, diskseq: int) -> None:
    """Require that the open device has this sequence number now. Raises: KernelError."""
    with reported_as("ask for the sequence number of", node):
        (found,) = struct.unpack("=Q", fcntl.ioctl(file, _BLKGETDISKSEQ, bytes(8)))
    if found != diskseq:
        raise is_another(node)


def logical_block(file: int, node: str) -> int:
    """Return the unit of reads and writes, in bytes. Raises: KernelError."""
    with reported_as("ask for the block size of", node):
        (found,) = struct.unpack("=i", fcntl.ioctl(file, _BLKSSZGET, bytes(4)))
    return int(found)


def read_partitions(file: int) -> None:
    """Have the kernel read the partitions of the open disk. Raises: OSError."""
    fcntl.ioctl(file, _BLKRRPART)
