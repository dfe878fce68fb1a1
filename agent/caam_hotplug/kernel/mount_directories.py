"""The directories that media are mounted on: in the mount root, or at a path of their own."""

from __future__ import annotations

import errno
import logging
import os
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import MountPointOccupiedError, UnsafePathError
from caam_hotplug.kernel import mountinfo, paths

log = logging.getLogger(__name__)

_REFUSED: Final = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG}
"""Errors of a place that is not there for the agent, until somebody changes it."""


class _Turns:
    """Who makes or removes a directory, one at a time for each place. Any thread."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._given_back = threading.Condition()

    @contextmanager
    def waited_for(self, place: str) -> Iterator[None]:
        """Hold the place, once nobody else does."""
        with self._given_back:
            self._given_back.wait_for(lambda: place not in self._taken)
            self._taken.add(place)
        try:
            yield
        finally:
            self._give_back(place)

    @contextmanager
    def taken_if_free(self, place: str) -> Iterator[bool]:
        """Hold the place if nobody else does; yield whether it is held."""
        with self._given_back:
            is_free = place not in self._taken
            self._taken.add(place)
        try:
            yield is_free
        finally:
            if is_free:
                self._give_back(place)

    def _give_back(self, place: str) -> None:
        with self._given_back:
            self._taken.discard(place)
            self._given_back.notify_all()


_TURNS: Final = _Turns()
"""So that no release of an earlier mount removes a directory right before a new one is on it."""


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
    OSError. It stays until the end.
    """
    with _TURNS.waited_for(place):
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
        # Not its device, of which a subvolume of btrfs has one of its own.
        if mountinfo.mount_of(opened) != mountinfo.mount_of(parent):
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
    another user's: the next mount uses it. So does one that is about to be mounted on. Return
    whether nothing is mounted there. Raises: OSError, unless it is missing, in use or has content.
    """
    with _TURNS.taken_if_free(place) as is_free:
        try:
            seen = mountinfo.mount_at(parent, names.name_of(place))
            is_other_mount = seen != mountinfo.mount_of(parent)
            if is_free and not is_other_mount:
                _remove(parent, place)
        except OSError as error:
            if names.is_path(place) and error.errno in _REFUSED:
                log.warning("%s is left, since it cannot be removed: %s", place, error.strerror)
            elif error.errno not in {errno.ENOENT, errno.EBUSY, errno.ENOTEMPTY}:
                raise
            return error.errno != errno.EBUSY
    return is_free and not is_other_mount


def _remove(parent: int, place: str) -> None:
    """Remove what nothing is mounted on, if it is ours. Raises: OSError."""
    name = names.name_of(place)
    status = os.lstat(name, dir_fd=parent)
    if stat.S_ISDIR(status.st_mode) and is_ours(status, place):
        os.rmdir(name, dir_fd=parent)


def mode_of(place: str) -> int:
    """Return the mode of a mount point that the agent makes."""
    return names.OWN_PATH_MODE if names.is_path(place) else names.MOUNT_POINT_MODE


def is_ours(status: os.stat_result, place: str) -> bool:
    """Return whether `mount_point` made a directory that nothing is mounted on.

    In a directory with the set-group-ID bit the kernel gives it that bit, too (inode_init_owner).
    """
    mode = stat.S_IMODE(status.st_mode) & ~stat.S_ISGID
    return (mode, status.st_uid) == (mode_of(place), os.geteuid())


def our_mount_points(root: Path) -> list[str]:
    """Return the names in the root of directories that we made and that nothing is mounted on.

    Mounted filesystems there are not touched: they may be others', and hang.
    """
    with suppress(FileNotFoundError), paths.directory(root) as opened:
        return [Path(point).name for point in _ours_among(opened, root, "*", "")]
    return []


def our_paths(globs: Iterable[str]) -> list[str]:
    """As `our_mount_points`, but paths outside the root, by globs for their last names.

    One whose directory above is not safe, or is not there, is none.
    """
    found: list[str] = []
    for each in globs:
        above, glob = Path(each).parent, names.name_of(each)
        with suppress(UnsafePathError, OSError), paths.directory(above, only_root=True) as opened:
            found += _ours_among(opened, above, glob, each)
    return list(dict.fromkeys(found))


def _ours_among(opened: int, above: Path, glob: str, place: str) -> Iterator[str]:
    """Yield the paths of the directories in the open one that are ours as the place would be."""
    mounted = {mount.point for mount in mountinfo.mounts()}
    for name in os.listdir(opened):
        point = str(above / name)
        if not fnmatchcase(name, glob) or point in mounted:
            continue
        with suppress(FileNotFoundError):  # it went meanwhile
            status = os.lstat(name, dir_fd=opened)
            if stat.S_ISDIR(status.st_mode) and is_ours(status, place):
                yield point
