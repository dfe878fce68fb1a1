"""Atomic new files: whole and on the disk before they are seen, never in another's place.

A file is written under a temporary name, synced and renamed. Then the directory, which has the
name, is synced (fsync(2)). An existing file of that name stays as it is.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.kernel import paths
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc

_RENAME_NOREPLACE: Final = 1
_FOR_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_NEW: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def temporary(name: str) -> str:
    """Return the name under which a file is written first, which a next run finds again."""
    return f".{name}.new"


@contextmanager
def folder(path: Path, *, mode: int, only_root: bool = False) -> Iterator[int]:
    """Yield a descriptor of the directory, made with this mode if missing. Raises: as directory."""
    try:
        with paths.directory(path, only_root=only_root) as opened:
            yield opened
            return
    except FileNotFoundError:
        pass
    with paths.directory(path.parent, create=True, only_root=only_root) as parent:
        with suppress(FileExistsError):
            os.mkdir(path.name, mode, dir_fd=parent)
        os.fsync(parent)
    with paths.directory(path, only_root=only_root) as opened:
        yield opened


@contextmanager
def alone_in(opened: int, path: Path) -> Iterator[None]:
    """Keep our other commands from making files in the directory. Raises: HotplugError."""
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise HotplugError(
            f"write to {shown(path)}: another command is making a key there; try again when it "
            "has ended"
        ) from error
    try:
        yield
    finally:
        fcntl.flock(opened, fcntl.LOCK_UN)


def exists(opened: int, name: str) -> bool:
    """Return whether the directory has anything of that name, even a dangling link."""
    try:
        os.lstat(name, dir_fd=opened)
    except FileNotFoundError:
        return False
    return True


def write(opened: int, path: Path, content: bytes | bytearray, mode: int) -> None:
    """Write a new file with this content to the disk. `path` is in the open directory.

    Raises: HotplugError if the name is taken, or if the mode is to keep it from others and the
    filesystem knows no modes; KernelError.
    """
    with reported_as("write", shown(path)):
        _write_temporary(opened, path, content, mode)
        try:
            _rename(opened, temporary(path.name), path)
        except BaseException:
            os.unlink(temporary(path.name), dir_fd=opened)
            raise
        os.fsync(opened)


def write_unsettled(opened: int, path: Path, content: bytes | bytearray, mode: int) -> None:
    """Write as `write`, but keep the temporary name as a second one until the file is settled.

    A file with both names is the work of a run that has not settled it: nobody relies on it yet.
    Raises: as write; HotplugError if the filesystem has no hard links.
    """
    with reported_as("write", shown(path)):
        _write_temporary(opened, path, content, mode)
        try:
            os.link(temporary(path.name), path.name, src_dir_fd=opened, dst_dir_fd=opened)
        except OSError as error:
            os.unlink(temporary(path.name), dir_fd=opened)
            if error.errno == errno.EEXIST:
                raise _taken(path) from error
            if error.errno in {errno.EPERM, errno.EOPNOTSUPP}:  # link(2)
                raise HotplugError(
                    f"write {shown(path)}: the filesystem there has no hard links, by which a run "
                    "that is interrupted is known; write it to another place, such as /root, and "
                    "move it"
                ) from error
            raise
        os.fsync(opened)


def is_unsettled(opened: int, name: str) -> bool:
    """Return whether the file has both names."""
    try:
        both = [os.lstat(each, dir_fd=opened) for each in (name, temporary(name))]
    except FileNotFoundError:
        return False
    return os.path.samestat(*both)


def settle(opened: int, path: Path) -> None:
    """Remove the file's temporary name, if it has one. Raises: KernelError."""
    with reported_as("settle", shown(path)):
        if exists(opened, temporary(path.name)):
            os.unlink(temporary(path.name), dir_fd=opened)
            os.fsync(opened)


def discard_unsettled(opened: int, path: Path) -> None:
    """Remove the file if it has both names. Raises: KernelError."""
    with reported_as("take back", shown(path)):
        if is_unsettled(opened, path.name):
            # Its own name first: no run searches for one that has the temporary name alone.
            os.unlink(path.name, dir_fd=opened)
            os.fsync(opened)


def _write_temporary(opened: int, path: Path, content: bytes | bytearray, mode: int) -> None:
    name = temporary(path.name)
    with suppress(FileNotFoundError):  # left by a run that was killed
        os.unlink(name, dir_fd=opened)
    file = os.open(name, _NEW, 0o600, dir_fd=opened)
    try:
        os.fchmod(file, mode)
        if not mode & _FOR_OTHERS:
            _require_kept_from_others(file, path)
        written = 0
        with memoryview(content) as view:
            while written < len(view):
                written += os.write(file, view[written:])
        os.fsync(file)
    except BaseException:
        with suppress(OSError):
            os.unlink(name, dir_fd=opened)
        raise
    finally:
        os.close(file)


def _require_kept_from_others(file: int, path: Path) -> None:
    """Raise HotplugError if others can read the file, since the filesystem keeps no modes (FAT)."""
    status = os.fstat(file)
    if status.st_mode & _FOR_OTHERS or status.st_uid != os.geteuid():
        raise HotplugError(
            f"write {shown(path)}: the filesystem there keeps no owners and modes, so others could "
            "read it; write it to another place, such as /root, and move it"
        )


def move(opened: int, path: Path, name: str) -> None:
    """Rename the file in its directory. Raises: HotplugError if the name is taken; KernelError."""
    with reported_as("rename", shown(path)):
        _rename(opened, path.name, path.with_name(name))
        os.fsync(opened)


def remove(opened: int, path: Path) -> None:
    """Remove the file. Raises: KernelError."""
    with reported_as("remove", shown(path)):
        os.unlink(path.name, dir_fd=opened)
        os.fsync(opened)


def _rename(opened: int, name: str, path: Path) -> None:
    """Rename to the path's name. Source: renameat2(2), which FAT without hard links has, too."""
    source, target = os.fsencode(name), os.fsencode(path.name)
    try:
        Libc.renameat2(opened, source, opened, target, _RENAME_NOREPLACE)
    except OSError as error:
        if error.errno == errno.EEXIST:
            raise _taken(path) from error
        raise


def _taken(path: Path) -> HotplugError:
    return HotplugError(f"write {shown(path)}: it exists, and is not overwritten")
