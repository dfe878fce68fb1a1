"""Blobs and recovery files where they are kept: written for good, read with care."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from caam_hotplug.errors import HotplugError, KernelError, shown
from caam_hotplug.formats import recovery_files
from caam_hotplug.kernel import atomic_files, memory
from caam_hotplug.model import SecretBytes

BLOB_MODE = 0o600
_DIRECTORY_MODE = 0o700


class Folder:
    """The blob directory, with nobody else of ours at work in it."""

    def __init__(self, path: Path, opened: int) -> None:
        self.path = path
        self.opened = opened
        """A descriptor of it."""

    def file(self, name: str) -> Path:
        """Where the blob of that name is, or would be."""
        return self.path / f"{name}.bb"

    def has(self, name: str) -> bool:
        """Whether there is a blob of that name, or anything else in its place."""
        return atomic_files.exists(self.opened, self.file(name).name)

    def is_unsettled(self, name: str) -> bool:
        """Whether its blob was made by a run that ended before any medium could rely on it."""
        return atomic_files.is_unsettled(self.opened, self.file(name).name)

    def write(self, name: str, blob: bytes, *, settled: bool) -> None:
        """The blob is there, on the disk. Raises: HotplugError if the name is taken; KernelError.

        One that is not `settled` may be taken back by the next run, as nobody relies on it yet.
        """
        write = atomic_files.write if settled else atomic_files.write_unsettled
        write(self.opened, self.file(name), blob, BLOB_MODE)

    def settle(self, name: str) -> None:
        """From now on a medium relies on the blob. Raises: KernelError."""
        atomic_files.settle(self.opened, self.file(name))

    def discard_unsettled(self, name: str) -> None:
        """A blob that nobody relies on is gone; any other stays. Raises: KernelError."""
        atomic_files.discard_unsettled(self.opened, self.file(name))


@contextmanager
def folder(path: Path) -> Iterator[Folder]:
    """The blob directory, made if it is missing.

    Raises: UnsafePathError; HotplugError if another command is at work in it.
    """
    with (
        atomic_files.folder(path, mode=_DIRECTORY_MODE) as opened,
        atomic_files.alone_in(opened, path),
    ):
        yield Folder(path, opened)


def require_new(name: str, folder: Folder) -> None:
    """Raises: HotplugError if there is a blob of that name already."""
    if folder.has(name):
        raise HotplugError(
            f"make a key {shown(name)}: {shown(folder.file(name))} exists, and whatever was "
            "encrypted with it would be lost; choose another name"
        )


def write_recovery(path: Path, about: recovery_files.About, key: SecretBytes) -> None:
    """The recovery file is there, on the disk, for its owner only; it is to be settled yet.

    Raises: HotplugError if there is a file of that name; KernelError.
    """
    head = recovery_files.head(about, path.name, len(key))
    length = len(head) + recovery_files.key_line_length(len(key))
    with memory.locked(length) as content, _parent(path) as parent:
        content.buffer[: len(head)] = head
        recovery_files.write_key_line(key, content.buffer, len(head))
        atomic_files.write_unsettled(parent, path, content.buffer, 0o600)


def is_recovery_unsettled(path: Path) -> bool:
    """Whether a run wrote it that ended before a medium relied on its key. Raises: KernelError."""
    with _parent(path) as parent:
        return atomic_files.is_unsettled(parent, path.name)


def settle_recovery(path: Path) -> None:
    """From now on a medium relies on its key. Raises: KernelError."""
    with _parent(path) as parent:
        if atomic_files.is_unsettled(parent, path.name):
            atomic_files.settle(parent, path)


def require_recovery_unsettled(path: Path) -> None:
    """Raises: HotplugError if there is a recovery file of no run that was interrupted."""
    if os.path.lexists(path) and not is_recovery_unsettled(path):
        raise HotplugError(
            f"write {shown(path)}: it exists, and is not of a run that was interrupted; it is not "
            "overwritten, and its key is not used again: name another file"
        )


@contextmanager
def recovery_key(
    path: Path, about: Callable[[str], recovery_files.About], length: int
) -> Iterator[tuple[str, SecretBytes, bool]]:
    """Identifier and key of the recovery file, and whether an interrupted run has left it.

    One is written if there is none. `about` says what a file of an identifier is to say. Raises:
    HotplugError if it is another's, or of no run that was interrupted.
    """
    if os.path.lexists(path):
        require_recovery_unsettled(path)
        with recovered_for(path, about, length) as (identifier, key):
            yield identifier, key, True
        return
    identifier = str(uuid4())
    with memory.random_key(length) as key:
        write_recovery(path, about(identifier), key)
        yield identifier, key, False


@contextmanager
def recovered_for(
    path: Path, about: Callable[[str], recovery_files.About], length: int
) -> Iterator[tuple[str, SecretBytes]]:
    """Identifier and key of a recovery file that is there. Raises: HotplugError if another's."""
    with recovered(path, only_roots=True) as (found, key):
        if (found, len(key)) != (about(found.id), length):
            raise HotplugError(
                f"write {shown(path)}: it exists, and is the recovery file of another medium "
                f"({found.label}, {found.cipher}, {found.sector_size}, {found.filesystem}, "
                f"{len(key)} bytes); it is not overwritten"
            )
        yield found.id, key


def is_open_to_others(path: Path) -> bool:
    """Whether others than root can read the file, or could have written it. Raises: OSError."""
    return _is_others(path.stat())


@contextmanager
def _parent(path: Path) -> Iterator[int]:
    try:
        opened = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError("open directory", shown(path.parent), error.errno or 0) from error
    try:
        yield opened
    finally:
        os.close(opened)


@contextmanager
def recovered(
    path: Path, *, only_roots: bool = False
) -> Iterator[tuple[recovery_files.About, SecretBytes]]:
    """What a recovery file says and its key, in locked buffers; overwritten on the way out.

    With `only_roots`, a file that others than root can read, or could have put there, is refused,
    and a link is not followed. Raises: RecoveryFileError; KernelError.
    """
    with (
        _content(path, only_roots=only_roots) as content,
        memory.locked(recovery_files.KEY_MAX_BYTES) as room,
    ):
        try:
            about = recovery_files.read_about(content)
            length = recovery_files.read_key(content, room)
        except recovery_files.RecoveryFileError as error:
            raise recovery_files.RecoveryFileError(f"read {shown(path)}: {error}") from error
        with memory.locked(length) as key:
            for at in range(length):  # a slice would be a copy
                key.buffer[at] = room.buffer[at]
            yield about, key


def _is_others(status: os.stat_result) -> bool:
    return status.st_uid != 0 or bool(status.st_mode & (stat.S_IRWXG | stat.S_IRWXO))


@contextmanager
def _content(path: Path, *, only_roots: bool) -> Iterator[bytearray]:
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_NOFOLLOW if only_roots else 0)
    try:
        file = os.open(path, flags)
    except OSError as error:
        if only_roots and error.errno == errno.ELOOP:
            raise recovery_files.RecoveryFileError(
                f"read {shown(path)}: it is a symbolic link; name the file itself"
            ) from error
        raise KernelError("read", shown(path), error.errno or 0) from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= recovery_files.MAX_BYTES:
            raise recovery_files.RecoveryFileError(f"read {shown(path)}: it is no recovery file")
        if only_roots and _is_others(status):
            raise recovery_files.RecoveryFileError(
                f"read {shown(path)}: it exists, and others than root can read it or could have "
                "written it, so that its key is not used; name another file"
            )
        with memory.locked(status.st_size) as content:
            if os.readv(file, [content.buffer]) != status.st_size:
                raise recovery_files.RecoveryFileError(f"read {shown(path)}: it was cut short")
            yield content.buffer
    finally:
        os.close(file)
