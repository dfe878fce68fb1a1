"""Whether all that was written to a mapping's filesystem has reached its medium.

The kernel reports a failed write once for each open file (errseq_t), and one that it has reported
to nobody also for a file that is opened later. Programs may have got the report before: so the
mapping's device is open since before the mount, for writes of metadata. For files' data there is
syncfs(2), with a directory of the filesystem. A directory that is open in the mount itself would
keep it busy, and the unmount would write out the rest unseen. So it is opened in a detached copy of
the mount, which outlives the unmount.

Source: lib/errseq.c, syncfs(2), open_tree(2), mount_setattr(2).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import FlushError, KernelError, MountError, WritesLostError
from caam_hotplug.kernel import sysfs_tree
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.kernel.mount_places import MountPlaces, Mounts
from caam_hotplug.model import Mapping
from caam_hotplug.names import name_of

_BLKFLSBUF: Final = 0x1261
_OPEN_TREE_CLONE: Final = 1
_AT_SYMLINK_NOFOLLOW: Final = 0x100
_AT_EMPTY_PATH: Final = 0x1000
_MS_PRIVATE: Final = 1 << 18
NOT_KNOWN: Final = {
    errno.EPERM, errno.EINTR, errno.EBADF, errno.EAGAIN, errno.ENOMEM, errno.ENFILE, errno.EMFILE,
}  # fmt: skip
"""Errors that say nothing of what was written. Filesystems have many others for a failed write."""
NOT_ALL: Final = "not all that was written to it has reached the medium"


class _MountAttr(ctypes.Structure):
    """struct mount_attr of linux/mount.h."""

    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


class WriteWatch:
    """A mapping's device, watched for failed writes. Synchronization: one thread at a time."""

    def __init__(self, mapping: Mapping, mount_root: Path, places: MountPlaces) -> None:
        """`places`: where filesystems are mounted. Raises: KernelError."""
        self._node = mapping.node
        self._mount_root = mount_root
        self._places = places
        self.lost = ""
        """What could not be written; empty while that is nothing."""
        self.has_errors = False
        """Whether the filesystem has counted errors since it was mounted."""
        try:
            self._device = os.open(self._node, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise KernelError("open", self._node, error.errno or 0) from error
        self._errors_before = 0

    def mounted(self) -> None:
        """Note which errors an ext4 has counted before: it keeps their number on the medium.

        Raises: FlushError.
        """
        self._errors_before = self._ext4_errors()

    def look(self) -> None:
        """Look for errors that the filesystem has counted; nothing is written. Raises: FlushError.

        Only ext4 counts them. It may not be read-only by them, in the words of mountinfo: Linux
        since 6.12 refuses writes without that (ext4_handle_error in fs/ext4/super.c).
        """
        self._look_at_ext4(self._node)

    def check(self) -> None:
        """Write out what the device has, and look for failed writes. Raises: FlushError."""
        self._try("flush", self._node, os.fsync, self._device)

    def unmount(
        self, place: str, which: Mounts, *, anyway: bool, before: Callable[[], None] = lambda: None
    ) -> None:
        """Write out the filesystem at the mount point, and unmount it.

        `which`: one of these mounts is seen there; else only the device is written out.
        `before`: called right before the unmount; what it raises ends this, and it stays mounted.
        `anyway`: also if something could not be written. Else it stays mounted then, unless its
        medium cannot be read either: nothing of it can be saved any more.
        Raises: WritesLostError; FlushError; MountBusyError; MountError. Then it stays mounted.
        """
        point = str(self._mount_root / place)
        with (
            reported_as("unmount", point, MountError),
            self._places.directory_of(place, which) as folder,
            _copied(folder, name_of(place), point) as directory,
        ):
            self._flush(directory, point)
            if self.lost and not anyway and self._is_readable():
                raise WritesLostError(self.lost)
            before()
            self._places.unmount(place, which)
            if directory is not None:  # what programs wrote after the first time
                self._try("flush", point, Libc.syncfs, directory, is_last=True)
            self._look_at_ext4(point, is_last=True)
        # What the filesystem wrote at its end.
        self._try("flush", self._node, os.fsync, self._device, is_last=True)

    def close(self) -> None:
        """Watch no more. Once is enough."""
        device, self._device = self._device, -1
        if device >= 0:
            os.close(device)

    def _flush(self, directory: int | None, point: str) -> None:
        if directory is not None:
            self._try("flush", point, Libc.syncfs, directory)
        else:
            # The kernel flushes a device's filesystem with the device (blkdev_flushbuf in
            # block/ioctl.c), and does not say whether files' data were written.
            self._try("flush", self._node, fcntl.ioctl, self._device, _BLKFLSBUF)
        self.check()
        self._look_at_ext4(point)

    def _try(
        self,
        operation: str,
        subject: str,
        call: Callable[..., object],
        *arguments: object,
        is_last: bool = False,
    ) -> None:
        """Make the call; note a failed write, and any failure of the last call.

        Raises: FlushError for another failure.
        """
        try:
            with reported_as(operation, subject, FlushError):
                call(*arguments)
        except FlushError as error:
            if error.errno in NOT_KNOWN and not is_last:
                raise
            self.note(str(error))

    def note(self, what: str) -> None:
        """Note what could not be written; the first stays."""
        self.lost = self.lost or f"{NOT_ALL}: {what}"

    def _look_at_ext4(self, point: str, *, is_last: bool = False) -> None:
        """Raises: FlushError if that is not known, and can be asked again."""
        try:
            found = self._ext4_errors()
        except FlushError as error:
            if not is_last:
                raise
            self.note(str(error))
            return
        self.has_errors = found > self._errors_before
        if self.has_errors:
            self.note(f"write to {point}: the filesystem has counted errors")

    def _is_readable(self) -> bool:
        try:
            opened = os.open(self._node, os.O_RDONLY | os.O_DIRECT | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                Blocks(opened, self._node).read(0, mmap.PAGESIZE)
            finally:
                os.close(opened)
        except OSError as error:
            return error.errno in NOT_KNOWN
        return True

    def _ext4_errors(self) -> int:
        """Return how many errors an ext4 has counted; 0 for others. Raises: FlushError."""
        name = self._node.rpartition("/")[2]
        file = f"fs/ext4/{name}/errors_count"
        try:
            return int(sysfs_tree.text(sysfs_tree.root(), file))
        except OSError as error:
            if error.errno in sysfs_tree.ABSENT:  # it is another filesystem
                return 0
            raise FlushError("look at the errors of", name, error.errno or errno.EIO) from error


@contextmanager
def _copied(folder: int | None, name: str, point: str) -> Iterator[int | None]:
    """Yield the root directory of a detached copy of the mount.

    None if its mode locks the agent out, which lacks CAP_DAC_READ_SEARCH, or without a directory in
    which the mount is seen. Raises: FlushError.
    """
    if folder is None:
        yield None
        return
    with reported_as("look at", point, FlushError):
        flags = _OPEN_TREE_CLONE | _AT_SYMLINK_NOFOLLOW | os.O_CLOEXEC
        copy = Libc.open_tree(folder, os.fsencode(name), flags)
    directory = None
    try:
        with reported_as("look at", point, FlushError):
            private = _MountAttr(propagation=_MS_PRIVATE)
            at, size = ctypes.byref(private), ctypes.sizeof(private)
            Libc.mount_setattr(copy, b"", _AT_EMPTY_PATH, at, size)
            with suppress(PermissionError):
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                directory = os.open(".", flags, dir_fd=copy)
        yield directory
    finally:
        if directory is not None:
            os.close(directory)
        os.close(copy)
