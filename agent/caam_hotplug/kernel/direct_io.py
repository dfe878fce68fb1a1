"""Blocks of a device or a file, read and written whole, past the cache."""

from __future__ import annotations

import errno
import mmap
import os

from caam_hotplug.errors import KernelError


class Blocks:
    """The bytes of an open file from a place on. Blocks for I/O.

    If the file is open with O_DIRECT, positions and lengths are to be multiples of the device's
    logical block; the memory is aligned as open(2) asks for.
    """

    def __init__(self, file: int, subject: str, start: int = 0) -> None:
        """`file` stays the caller's. `start`: where position 0 is, in bytes."""
        self._file = file
        self._subject = subject
        self._start = start

    def read(self, position: int, length: int) -> bytes:
        """Read so many bytes. Raises: KernelError, also if there are fewer."""
        with mmap.mmap(-1, length) as room:
            try:
                done = os.preadv(self._file, [room], self._start + position)
            except OSError as error:
                raise self._failed("read", position, error.errno) from error
            if done != length:
                raise self._failed("read", position, errno.EIO)
            return room[:]

    def write(self, position: int, content: bytes) -> None:
        """Write the bytes, which `flush` brings to the medium. Raises: KernelError."""
        with mmap.mmap(-1, len(content)) as room:
            room[:] = content
            try:
                done = os.pwritev(self._file, [room], self._start + position)
            except OSError as error:
                raise self._failed("write to", position, error.errno) from error
            if done != len(content):
                raise self._failed("write to", position, errno.EIO)

    def flush(self) -> None:
        """Bring all that was written to the medium. Raises: KernelError. Source: fdatasync(2)."""
        try:
            os.fdatasync(self._file)
        except OSError as error:
            raise KernelError("sync", self._subject, error.errno or 0) from error

    def refresh(self) -> None:
        """Drop the cache, so that the next read is from the medium. Raises: KernelError.

        A page that could not be synced stays in the cache and counts as clean, so a read from there
        would show as stored what is not. Source: posix_fadvise(2); fsync(2).
        """
        self.flush()
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def _failed(self, operation: str, position: int, number: int | None) -> KernelError:
        place = f"at byte {self._start + position}"
        return KernelError(operation, self._subject, number or 0, place)
