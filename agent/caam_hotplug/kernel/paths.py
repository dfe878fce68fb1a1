"""Directories opened component by component, so that no link and no other user leads elsewhere."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import UnsafePathError, shown

OPEN: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@contextmanager
def directory(
    path: Path, *, create: bool = False, only_root: bool = False, anyones: bool = False
) -> Iterator[int]:
    """Yield a file descriptor of the directory, for calls that take a `dir_fd`.

    Every component must be a directory of root's that nobody else may write to. A sticky one such
    as /tmp may be written to: there users move only their own files. With `create`, missing
    components are made with mode 0755, and are on the disk then. With `only_root`, a sticky one is
    refused, too: there anybody can put what does not exist yet, such as a drop-in. With `anyones`,
    only links are refused.

    Raises: UnsafePathError naming the component; OSError; ValueError for a relative path.
    """
    if not path.is_absolute():
        raise ValueError(f"{path} is not absolute")
    here = os.open("/", OPEN)
    try:
        if not anyones:
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
            if not anyones:
                require_roots(here, path, walked, only_root=only_root)
        yield here
    finally:
        os.close(here)


def _open_component(here: int, name: str, path: Path, walked: int) -> int:
    """Open the path's next component in the open directory. Raises: UnsafePathError; OSError."""
    try:
        return os.open(name, OPEN, dir_fd=here)
    except NotADirectoryError as error:
        cause, component = "is not a directory but a link or a file", _component(path, walked)
        raise UnsafePathError(path, component, cause, "name a path without links") from error
    except PermissionError as error:  # root's, without the right to pass over modes
        raise cannot_be_opened(here, name, path, _component(path, walked)) from error


def cannot_be_opened(here: int, name: str, path: Path, component: Path) -> UnsafePathError:
    """Return the error of a directory that root may not open, by its name in the open one."""
    status = os.lstat(name, dir_fd=here)
    whose = f"user {status.st_uid} with mode {stat.S_IMODE(status.st_mode):04o}"
    cause = f"belongs to {whose}, and cannot be opened"
    remedy = f"chown root {shown(component)}; chmod u+rx {shown(component)}"
    return UnsafePathError(path, component, cause, remedy)


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
