"""The directories that media are mounted on: in the mount root, or at a path of their own."""

from __future__ import annotations

import errno
import logging
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import MountPointOccupiedError, UnsafePathError
from caam_hotplug.kernel import mountinfo, paths

log = logging.getLogger(__name__)

_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of a place that is not there for the agent, until somebody changes it."""


@contextmanager
def parent_of(root: Path, place: str, *, create: bool = False) -> Iterator[int]:
    """Yield the directory that has the mount point: the root, or that of a path of its own.

    `create`: the root is made if missing; a directory outside it never is. Raises: as `directory`.
    """
    is_own = names.is_path(place)
    folder = (root / place).parent if is_own else root
    with paths.directory(folder, create=create and not is_own, only_root=is_own) as opened:
        yield opened


@contextmanager
def parent_to_leave(root: Path, place: str) -> Iterator[int]:
    """As `parent_of`, for what is mounted already.

    Others may have got the right to change the directories of a path since. The mount is known by
    its number, so that is no reason to leave it there. Raises: as `directory`.
    """
    is_own = names.is_path(place)
    with paths.directory((root / place).parent if is_own else root, anyones=is_own) as opened:
        yield opened


@contextmanager
def mount_point(root: Path, place: str) -> Iterator[int]:
    """Yield a descriptor of the empty directory at the place, made by us if missing.

    `place`: a name in the root, or a path of its own. Raises: MountPointOccupiedError if it has
    content or is no directory, or if its own path is not safe or not there; UnsafePathError;
    OSError.
    """
    with _said_of(root, place), parent_of(root, place, create=True) as parent:
        _make(parent, root / place, place)
        opened = _open_free(parent, root / place)
    try:
        yield opened
    finally:
        os.close(opened)


def why_occupied(root: Path, place: str) -> str:
    """Return why `mount_point` would refuse the place, as it says it; empty if it would not.

    Nothing is made. Raises: UnsafePathError; OSError.
    """
    try:
        with _said_of(root, place), parent_of(root, place) as parent:
            _require_free(parent, root / place, place)
    except FileNotFoundError:
        return ""
    except MountPointOccupiedError as error:
        return str(error)
    return ""


def _make(parent: int, path: Path, place: str) -> None:
    """Make the directory unless something is there. Raises: MountPointOccupiedError; OSError."""
    try:
        # A umask cannot add bits, so the mode that marks it as ours is certain.
        os.mkdir(path.name, mode_of(place), dir_fd=parent)
    except FileExistsError:
        pass
    except OSError as error:
        if names.is_path(place) and error.errno in _REFUSED:
            raise MountPointOccupiedError(_not_made(parent, path)) from error
        raise


def _require_free(parent: int, path: Path, place: str) -> None:
    """Require that the place is free, or can be made. Raises: MountPointOccupiedError; OSError."""
    try:
        os.close(_open_free(parent, path))
    except FileNotFoundError as error:
        may_make = os.access(".", os.W_OK | os.X_OK, dir_fd=parent)
        if names.is_path(place) and not may_make:
            raise MountPointOccupiedError(_not_made(parent, path)) from error


def _not_made(parent: int, path: Path) -> str:
    is_read_only = os.fstatvfs(parent).f_flag & os.ST_RDONLY
    why = "is on a read-only filesystem" if is_read_only else "lets the agent make nothing in it"
    return f"{path} is missing, and {path.parent} {why}; make it"


@contextmanager
def _said_of(root: Path, place: str) -> Iterator[None]:
    """Have errors of a path of its own say why nothing can be mounted there.

    Raises: MountPointOccupiedError.
    """
    if not names.is_path(place):
        yield
        return
    path = root / place
    try:
        yield
    except UnsafePathError as error:
        raise MountPointOccupiedError(str(error)) from error
    except FileNotFoundError as error:
        why = f"{path.parent} is missing, and is not made by the agent: mkdir -p {path.parent}"
        raise MountPointOccupiedError(why) from error
    except OSError as error:
        if error.errno in _REFUSED:
            raise MountPointOccupiedError(f"open {path}: {error.strerror}") from error
        raise


def _open_free(parent: int, path: Path) -> int:
    """Open an empty directory in the open parent. Raises: MountPointOccupiedError; OSError."""
    try:
        opened = os.open(path.name, paths.OPEN, dir_fd=parent)
    except NotADirectoryError as error:
        raise MountPointOccupiedError(f"{path} is a link or a file") from error
    except PermissionError as error:
        raise paths.cannot_be_opened(parent, path.name, path, path) from error
    try:
        if os.fstat(opened).st_dev != os.fstat(parent).st_dev:
            raise MountPointOccupiedError(f"something is mounted at {path}")
        if os.listdir(opened):  # noqa: PTH208  a descriptor is no path
            raise MountPointOccupiedError(f"{path} is not empty")
    except BaseException:
        os.close(opened)
        raise
    return opened


def not_there(place: str) -> tuple[type[Exception], ...]:
    """Return the errors of `parent_to_leave` that say that we have made no such directory.

    A path that leads through a link or a file did so at the mount, too, or leads elsewhere now.
    """
    return (FileNotFoundError, UnsafePathError) if names.is_path(place) else (FileNotFoundError,)


def remove_mount_point(root: Path, place: str) -> None:
    """As `remove_from`, by the path."""
    with suppress(*not_there(place)), parent_to_leave(root, place) as parent:
        remove_from(parent, place)


def remove_from(parent: int, place: str) -> bool:
    """Remove the directory in the open one if it is ours; the board's own stay.

    One at a path stays also where the filesystem has become read-only, or the directory above
    another user's: the next mount uses it. Return whether nothing is mounted there.
    Raises: OSError, unless it is missing, in use or has content.
    """
    name = names.name_of(place)
    try:
        status = os.lstat(name, dir_fd=parent)
        if stat.S_ISDIR(status.st_mode) and is_ours(status, place):
            os.rmdir(name, dir_fd=parent)
    except OSError as error:
        if names.is_path(place) and error.errno in _REFUSED:
            log.warning("%s is left, since it cannot be removed: %s", place, error.strerror)
        elif error.errno not in {errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY}:
            raise
        return error.errno != errno.EBUSY
    return status.st_dev == os.fstat(parent).st_dev


def mode_of(place: str) -> int:
    """Return the mode of a mount point that the agent makes."""
    return names.OWN_PATH_MODE if names.is_path(place) else names.MOUNT_POINT_MODE


def is_ours(status: os.stat_result, place: str) -> bool:
    """Return whether `mount_point` made a directory that nothing is mounted on.

    In a directory with the set-group-ID bit the kernel gives it that bit, too (inode_init_owner).
    """
    return stat.S_IMODE(status.st_mode) & ~stat.S_ISGID == mode_of(place)


def our_mount_points(root: Path, folders: Iterable[Path] = ()) -> list[str]:
    """Return the places that we made and that nothing is mounted on: in the root and the folders.

    Mounted filesystems there are not touched: they may be others', and hang. One that is not
    safe has none.
    """
    mounted = {mount.point for mount in mountinfo.mounts()}
    found: list[str] = []
    for folder in folders:
        with suppress(UnsafePathError, OSError), paths.directory(folder, only_root=True) as opened:
            places = {name: str(folder / name) for name in os.listdir(opened)}  # noqa: PTH208
            found += _ours_among(opened, {n: p for n, p in places.items() if p not in mounted})
    with suppress(FileNotFoundError), paths.directory(root) as opened:
        names_there = os.listdir(opened)  # noqa: PTH208
        there = {name: name for name in names_there if str(root / name) not in mounted}
        found += _ours_among(opened, there)
    return found


def _ours_among(opened: int, places: dict[str, str]) -> Iterator[str]:
    """Yield the places in the open directory that are ours, of these with their names there."""
    for name, place in places.items():
        with suppress(FileNotFoundError):  # it went meanwhile
            status = os.lstat(name, dir_fd=opened)
            if stat.S_ISDIR(status.st_mode) and is_ours(status, place):
                yield place
