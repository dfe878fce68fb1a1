"""The bytes of a held medium, read and written past the kernel's cache."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import disks, gpt
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.model import SECTOR_BYTES
from caam_hotplug.provisioning.options import Progress
from caam_hotplug.provisioning.reencryption import PIECE_BYTES

_DIRECT: Final = os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def opened(node: str, access: int) -> Iterator[int]:
    """Open the device for direct I/O. `access`: os.O_RDONLY or os.O_RDWR. Raises: KernelError."""
    try:
        file = os.open(node, access | _DIRECT)
    except OSError as error:
        raise KernelError("open", node, error.errno or 0) from error
    try:
        yield file
    finally:
        os.close(file)


def require_readable(hold: disks.Held, entry: gpt.Entry, progress: Progress) -> None:
    """Read the whole partition. Raises: KernelError if a sector cannot be read.

    Found later, such a sector would leave the medium under two keys.
    """
    disk, length = hold.disk, entry.length * SECTOR_BYTES
    with opened(disk.node, os.O_RDONLY) as raw:
        hold.require_same(raw)
        blocks = Blocks(raw, disk.node, entry.start * SECTOR_BYTES)
        for position in range(0, length, PIECE_BYTES):
            progress(f"reading all of it once: {100 * position // length} %")
            blocks.read(position, min(PIECE_BYTES, length - position))
