"""Directories opened component by component, so that no link and no other user leads elsewhere."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from caam_hotplug import names
from caam_hotplug.errors import MountPointOccupiedError, UnsafePathError, shown
from caam_hotplug.kernel import mountinfo

_OPEN = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def directory(path: Path, *, create: bool = False, only_root: bool = False) -> Iterator[int]:
    """Yield a file descriptor of the directory, for calls that take a `dir_fd`.

    Every component must be a directory of root's that nobody else may write to. A sticky one such
    as /tmp may be written to: there users move only their own files. With `create`, missing
    components are made with mode 0755, and are on the disk then. With `only_root`, a sticky one is
    refused, too: there anybody can put what does not exist yet, such as a drop-in.

    Raises: UnsafePathError naming the component; OSError; ValueError for a relative path.
    """
    if not path.is_absolute():
        raise ValueError(f"{path} is not absolute")
    here = os.open("/", _OPEN)
    try:
        require_roots(here, path, 1, only_root=only_root)
        for walked, component in enumerate(path.parts[1:], 2):
            try:
                below = _open_component(here, component, path, walked)
            except FileNotFoundError:
                if not create:
                    raise
                with suppress(FileExistsError):
                    os.mkdir(component, 0o755, dir_fd=here)
                    os.fsync(here)  # which has the name
                below = _open_component(here, component, path, walked)
            os.close(here)
            here = below
            require_roots(here, path, walked, only_root=only_root)
        yield here
    finally:
        os.close(here)


def _open_component(here: int, name: str, path: Path, walked: int) -> int:
    """Open the path's next component in the open directory. Raises: UnsafePathError; OSError."""
    try:
        return os.open(name, _OPEN, dir_fd=here)
    except NotADirectoryError as error:
        cause, component = "is not a directory but a link or a file", _component(path, walked)
        raise UnsafePathError(path, component, cause, "name a path without links") from error
    except PermissionError as error:  # root's, without the right to pass over modes
        status, component = os.lstat(name, dir_fd=here), _component(path, walked)
        whose = f"user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
        cause = f"belongs to {whose}, and cannot be opened"
        remedy = f"chown root {shown(component)}; chmod u+rx {shown(component)}"
        raise UnsafePathError(path, component, cause, remedy) from error


def _component(path: Path, walked: int | None) -> Path:
    return Path(*path.parts[:walked])


def require_roots(
    opened: int, path: Path, walked: int | None = None, *, only_root: bool = False
) -> None:
    """Raise UnsafePathError if others than root own or may write the open file or directory.

    An access list shows here, too: its mask is the group's part of the mode (acl(5)). Unless
    `only_root`, an ordinary user who runs us may own it, and it may be sticky. `walked`: how many
    parts of the path lead to it, by default all.
    """
    status = os.fstat(opened)
    others_write = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    if status.st_uid == 0 and not others_write:
        return
    component = _component(path, walked)
    if status.st_uid not in ({0} if only_root else {0, os.geteuid()}):
        cause = f"belongs to user {status.st_uid}, not to root"
        raise UnsafePathError(path, component, cause, f"chown root {shown(component)}")
    if not others_write:
        return
    if not status.st_mode & stat.S_ISVTX:
        cause = "can be written by others than root"
        raise UnsafePathError(path, component, cause, f"chmod go-w {shown(component)}")
    if only_root:
        cause = "is a place where everyone may put files, sticky as it is"
        raise UnsafePathError(path, component, cause, "choose one where only root may")


@contextmanager
def mount_point(root: Path, name: str) -> Iterator[int]:
    """Yield a descriptor of the empty directory `name` in the root, made by us if missing.

    Raises: MountPointOccupiedError if it has content or is no directory; UnsafePathError; OSError.
    """
    path = root / name
    with directory(root, create=True) as parent:
        with suppress(FileExistsError):
            # A umask cannot add bits, so the mode that marks it as ours is certain.
            os.mkdir(name, names.MOUNT_POINT_MODE, dir_fd=parent)
        opened = _open_free(parent, path)
    try:
        yield opened
    finally:
        os.close(opened)


def why_occupied(root: Path, name: str) -> str:
    """Return why `mount_point` would refuse the name, as it says it; empty if it would not.

    Nothing is made. Raises: UnsafePathError; OSError.
    """
    try:
        with directory(root) as parent:
            os.close(_open_free(parent, root / name))
    except FileNotFoundError:
        return ""
    except MountPointOccupiedError as error:
        return str(error)
    return ""


def _open_free(parent: int, path: Path) -> int:
    """Open an empty directory in the open parent. Raises: MountPointOccupiedError; OSError."""
    try:
        opened = os.open(path.name, _OPEN, dir_fd=parent)
    except NotADirectoryError as error:
        raise MountPointOccupiedError(f"{path} is a link or a file") from error
    try:
        if os.fstat(opened).st_dev != os.fstat(parent).st_dev:
            raise MountPointOccupiedError(f"something is mounted at {path}")
        if os.listdir(opened):
            raise MountPointOccupiedError(f"{path} is not empty")
    except BaseException:
        os.close(opened)
        raise
    return opened


def remove_mount_point(root: Path, name: str) -> None:
    """As `remove_from`, by the path of the root."""
    with suppress(FileNotFoundError), directory(root) as parent:
        remove_from(parent, name)


def remove_from(parent: int, name: str) -> bool:
    """Remove the directory in the open one if it is ours; the board's own stay.

    Return whether nothing is mounted there. Raises: OSError, unless it is missing, in use or has
    content.
    """
    try:
        status = os.lstat(name, dir_fd=parent)
        if stat.S_ISDIR(status.st_mode) and is_ours(status):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY}:
            raise
        return error.errno != errno.EBUSY
    return status.st_dev == os.fstat(parent).st_dev


def is_ours(status: os.stat_result) -> bool:
    """Return whether `mount_point` made a directory that nothing is mounted on."""
    return stat.S_IMODE(status.st_mode) == names.MOUNT_POINT_MODE


def our_mount_points(root: Path) -> list[str]:
    """Return the names of directories in the root that we made and that nothing is mounted on.

    Mounted filesystems there are not touched: they may be others', and hang.
    """
    mounted = {mount.point for mount in mountinfo.mounts()}
    found = []
    try:
        with directory(root) as parent:
            for name in os.listdir(parent):
                if str(root / name) not in mounted:
                    with suppress(FileNotFoundError):  # it went meanwhile
                        status = os.lstat(name, dir_fd=parent)
                        if stat.S_ISDIR(status.st_mode) and is_ours(status):
                            found.append(name)
    except FileNotFoundError:
        return []
    return found
