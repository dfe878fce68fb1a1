"""Blocks of a device, copied from the medium past the cache, as a file that a library can read.

libblkid reads into memory of its own, which O_DIRECT does not take. The cache may hold blocks that
were written or changed below it: another medium's, or those of a moment ago.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import reported_as

log = logging.getLogger(__name__)

_MFD_NOEXEC_SEAL: Final = 8
"""From linux/memfd.h, since Linux 6.3; where vm.memfd_noexec is 2, no other file is made."""
_ROOM_BYTES: Final = 68 << 10
_MOST_ROOMS: Final = 2
_rooms: Final[list[mmap.mmap]] = []
"""Memory that nobody uses now."""


class PartialCopy:
    """A file in memory, as long as the device. What was not copied reads as zeros.

    Blocks for I/O.
    """

    def __init__(self, device: int, node: str, block: int) -> None:
        """`device`: open for reading, it stays the caller's. `block`: its logical one, in bytes.

        Raises: KernelError.
        """
        self.node = node
        self.block = block
        self._device = device
        self._added: list[tuple[int, int]] = []
        self._step = max(block, mmap.ALLOCATIONGRANULARITY)
        with reported_as("copy blocks of", node):
            self.size = os.lseek(device, 0, os.SEEK_END)
            self.file = _memory_file()
            try:
                os.ftruncate(self.file, self.size)
            except OSError:
                self.close()
                raise

    def close(self) -> None:
        """Free the memory."""
        os.close(self.file)

    def add_head(self, length: int) -> None:
        """Copy the first bytes; if they cannot all be read, the first block alone.

        Raises: KernelError.
        """
        try:
            self.add(0, length)
        except KernelError:
            self._copy(0, min(self.block, self.size))

    def add(self, position: int, length: int) -> None:
        """Copy these bytes, and those around them up to whole blocks, unless they are there.

        What lies outside the device is left out. Raises: KernelError.
        """
        begin = max(position, 0) // self._step * self._step
        end = min(-(-(position + length) // self._step) * self._step, self.size)
        if begin >= end or any(first <= begin and end <= last for first, last in self._added):
            return
        self._copy(begin, end)
        self._added.append((begin, end))

    def read(self, position: int, length: int) -> bytes:
        """Return bytes of the copy, fewer at its end. Raises: KernelError."""
        if not 0 <= position < self.size:
            return b""
        with reported_as("read the copy of", self.node):
            return os.pread(self.file, length, position)

    def _copy(self, begin: int, end: int) -> None:
        with reported_as("read", self.node), _room(end - begin) as room:
            done = self._read(room, begin)
            if os.pwrite(self.file, room[:done], begin) != end - begin:
                raise KernelError("read", self.node, errno.EIO, f"at byte {begin}")

    def _read(self, room: memoryview, position: int) -> int:
        """Read whole blocks into memory. Raises: OSError."""
        try:
            return os.preadv(self._device, [room], position)
        except OSError as error:
            flags = fcntl.fcntl(self._device, fcntl.F_GETFL)
            if error.errno != errno.EINVAL or not flags & os.O_DIRECT:
                raise
            # A driver may ask for another alignment than it says. Its media stay usable: what the
            # cache has is then the best that there is.
            fcntl.fcntl(self._device, fcntl.F_SETFL, flags & ~os.O_DIRECT)
            log.warning("%s cannot be read past the kernel's cache; reading that", self.node)
        return os.preadv(self._device, [room], position)


@contextmanager
def _room(length: int) -> Iterator[memoryview]:
    """Yield memory for whole blocks. Some is kept: to get it takes longer than to read into it.

    Raises: OSError.
    """
    room = None
    if length <= _ROOM_BYTES:
        with suppress(IndexError):  # other threads have all of it
            room = _rooms.pop()
    room = room or mmap.mmap(-1, max(length, _ROOM_BYTES))
    try:
        with memoryview(room) as whole, whole[:length] as part:
            yield part
    finally:
        if len(room) == _ROOM_BYTES and len(_rooms) < _MOST_ROOMS:
            _rooms.append(room)


def _memory_file() -> int:
    """Return a new file in memory. Raises: OSError."""
    flags = os.MFD_CLOEXEC
    try:
        return os.memfd_create("blocks", flags | _MFD_NOEXEC_SEAL)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create("blocks", flags)
