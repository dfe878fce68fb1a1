"""Mounting a filesystem, and unmounting it."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

from caam_hotplug.errors import MountBusyError, MountError
from caam_hotplug.formats import mount_options
from caam_hotplug.kernel.ctypes_lib import Function, reported_as
from caam_hotplug.kernel.libc import Libc

_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSMOUNT_CLOEXEC: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

_MOUNT_ATTR_RDONLY: Final = 0x01
_MOUNT_ATTRS: Final = {
    "nosuid": 0x02,
    "nodev": 0x04,
    "noexec": 0x08,
    "relatime": 0x00,
    "noatime": 0x10,
    "strictatime": 0x20,
    "nodiratime": 0x80,
    "nosymfollow": 0x200000,
}

_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_FITHAW: Final = 0xC0045878

log = logging.getLogger(__name__)


def mount(
    node: str,
    kind: str,
    target: int,
    *,
    read_only: bool,
    options: Sequence[str],
    filesystem_options: Sequence[str],
) -> None:
    """Mount the filesystem on the open directory `target`.

    Its flags hold from the first moment: it is configured and only then attached. Raises:
    MountError with the stage that failed and the kernel's own words. Blocks for I/O.
    Source: fsopen(2), fsconfig(2), fsmount(2), move_mount(2).
    """
    attributes = sum(_MOUNT_ATTRS[option] for option in set(options))
    attributes |= _MOUNT_ATTR_RDONLY if read_only else 0
    with _superblock(node, kind, filesystem_options, read_only=read_only) as context:
        mounted = _call(context, "mount", node, Libc.fsmount, context, _FSMOUNT_CLOEXEC, attributes)
        try:
            flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
            _call(context, "attach", node, Libc.move_mount, mounted, b"", target, b"", flags)
        finally:
            os.close(mounted)


def require_readable(node: str, kind: str) -> None:
    """Have the kernel read the filesystem and write nothing, not even what its journal has left.

    Raises: MountError. Blocks for I/O.
    """
    with _superblock(node, kind, mount_options.without_replay(kind), read_only=True):
        pass


@contextmanager
def _superblock(node: str, kind: str, options: Sequence[str], *, read_only: bool) -> Iterator[int]:
    """Yield the context of a filesystem that the kernel has read. Raises: MountError."""
    with reported_as("mount", f"{node} ({kind})", _not_opened):
        context = Libc.fsopen(kind.encode(), _FSOPEN_CLOEXEC)
    try:
        _configure(context, "source", node, node)
        for option in options:
            key, _, value = option.partition("=")
            _configure(context, key, value or None, node)
        if read_only:
            _configure(context, "ro", None, node)
        _call(context, "mount", node, Libc.fsconfig, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        yield context
    finally:
        os.close(context)


def _configure(context: int, key: str, value: str | None, node: str) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    encoded = None if value is None else value.encode()
    shown = key if value is None else f"{key}={value}"
    operation = f"set option {shown} for"
    _call(context, operation, node, Libc.fsconfig, context, command, key.encode(), encoded, 0)


def _not_opened(operation: str, subject: str, number: int) -> MountError:
    hint = "the kernel lacks this filesystem" if number == errno.ENODEV else ""
    return MountError(operation, subject, number, hint)


def _call(context: int, operation: str, node: str, function: Function, *arguments: Any) -> int:
    """Call the function. Raises: MountError with the words that the context has of its failure."""

    def failed(operation: str, subject: str, number: int) -> MountError:
        return MountError(operation, subject, number, _kernel_words(context))

    with reported_as(operation, node, failed):
        result: int = function(*arguments)
    return result


def _kernel_words(context: int) -> str:
    """Return the filesystem's messages from its context, without their level letters."""
    words: list[str] = []
    try:
        while line := os.read(context, 8192):
            words.append(line.decode(errors="replace").strip()[2:])
    except OSError:  # ENODATA: nothing more was said
        pass
    return "; ".join(words)


def unmount(path: str, *, lazily: bool = False) -> None:
    """Unmount the path; lazily, so that processes with open files may go on using them.

    Raises: MountBusyError; MountError. Blocks for I/O unless lazily. Source: umount2(2).
    """
    flags = _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0)
    if not lazily:
        with suppress(OSError):  # its mode may lock the agent out
            _thaw_at(path)
    with reported_as("unmount", path, _not_unmounted):
        try:
            Libc.umount2(os.fsencode(path), flags)
        except OSError as error:
            if error.errno not in {errno.EINVAL, errno.ENOENT}:
                raise


def _thaw_at(path: str) -> None:
    """Thaw the filesystem, if somebody has frozen it. Raises: OSError.

    It would outlive its unmount, and nobody could thaw it then (freeze_super in fs/super.c).
    """
    opened = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.ioctl(opened, _FITHAW, 0)
        log.warning("%s was frozen, and is thawed to be unmounted", path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # that says that it is not frozen
            raise
    finally:
        os.close(opened)


def _not_unmounted(operation: str, path: str, number: int) -> MountError:
    kind = MountBusyError if number == errno.EBUSY else MountError
    return kind(operation, path, number)
