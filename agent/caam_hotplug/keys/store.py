"""Blobs and recovery files where they are kept."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from caam_hotplug.errors import BlobError, HotplugError, KernelError, shown
from caam_hotplug.formats import blobs, recovery_files
from caam_hotplug.kernel import atomic_files, blob_files, memory, paths
from caam_hotplug.model import SecretBytes

BLOB_MODE = 0o600
_DIRECTORY_MODE = 0o700


@dataclass(frozen=True, slots=True)
class FoundBlob:
    """What lies in the place of a blob."""

    exists: bool
    """Whether anything has the blob's name."""
    is_unsettled: bool
    """Whether an interrupted run made it, and no medium relies on it."""
    blob: blobs.Blob | None
    """None if there is none, or it cannot be read."""


@dataclass(frozen=True, slots=True)
class FoundRecovery:
    """A recovery file that fits the medium. Its key stays in the file."""

    id: str
    is_unsettled: bool
    """Whether an interrupted run made it, and no medium relies on it."""


class Folder:
    """The blob directory, locked against the other commands that write to it."""

    def __init__(self, path: Path, opened: int) -> None:
        self.path = path
        self.opened = opened
        """A descriptor of the directory."""

    def file(self, name: str) -> Path:
        """Return the path of the blob with that name."""
        return self.path / f"{name}.bb"

    def has(self, name: str) -> bool:
        """Whether anything has the name of that blob."""
        return atomic_files.exists(self.opened, self.file(name).name)

    def is_unsettled(self, name: str) -> bool:
        """Whether an interrupted run made the blob, and no medium relies on it."""
        return atomic_files.is_unsettled(self.opened, self.file(name).name)

    def read(self, name: str) -> blobs.Blob:
        """Read the blob as it is stored. Raises: BlobError."""
        return blob_files.read(self.path, self.file(name).name)

    def write(self, name: str, blob: bytes, *, settled: bool) -> None:
        """Write a new blob, and sync it. Raises: HotplugError if the name is taken; KernelError.

        The next run may discard a blob that is not `settled`, as no medium relies on it.
        """
        write = atomic_files.write if settled else atomic_files.write_unsettled
        write(self.opened, self.file(name), blob, BLOB_MODE)

    def settle(self, name: str) -> None:
        """Settle the blob, as a medium relies on it. Raises: KernelError."""
        atomic_files.settle(self.opened, self.file(name))

    def discard_unsettled(self, name: str) -> None:
        """Remove the blob if it is not settled. Raises: KernelError."""
        atomic_files.discard_unsettled(self.opened, self.file(name))


@contextmanager
def folder(path: Path) -> Iterator[Folder]:
    """Open and lock the blob directory; make it if it is missing.

    Raises: UnsafePathError; HotplugError if another command has locked it.
    """
    with (
        atomic_files.folder(path, mode=_DIRECTORY_MODE) as opened,
        atomic_files.alone_in(opened, path),
    ):
        yield Folder(path, opened)


def find_blob(directory: Path, file: str) -> FoundBlob:
    """Read the blob in that file of the blob directory, if it is there. Nothing is made.

    Raises: UnsafePathError.
    """
    try:
        with paths.directory(directory) as opened:
            exists = atomic_files.exists(opened, file)
            is_unsettled = atomic_files.is_unsettled(opened, file)
    except FileNotFoundError:
        return FoundBlob(exists=False, is_unsettled=False, blob=None)
    blob = None
    with suppress(BlobError):
        blob = blob_files.read(directory, file)
    return FoundBlob(exists, is_unsettled, blob)


def require_new(name: str, folder: Folder) -> None:
    """Check that no blob has that name. Raises: HotplugError."""
    if folder.has(name):
        raise HotplugError(why_taken(name, folder.file(name)))


def why_taken(name: str, file: Path) -> str:
    """Return the message for a blob that is in the way of a new one."""
    return (
        f"make a key {shown(name)}: {shown(file)} exists, and whatever was encrypted with it "
        "would be lost; choose another name"
    )


def write_recovery(path: Path, about: recovery_files.About, key: SecretBytes) -> None:
    """Write a new recovery file for its owner only, not settled yet, and sync it.

    Raises: HotplugError if the name is taken; KernelError.
    """
    head = recovery_files.head(about, path.name, len(key))
    length = len(head) + recovery_files.key_line_length(len(key))
    with memory.locked(length) as content, _parent(path) as parent:
        content.buffer[: len(head)] = head
        recovery_files.write_key_line(key, content.buffer, len(head))
        atomic_files.write_unsettled(parent, path, content.buffer, 0o600)


def find_recovery(
    path: Path, about: Callable[[str], recovery_files.About], length: int
) -> FoundRecovery | None:
    """Read the recovery file if it is there. `about` describes the medium, given an identifier.

    Raises: HotplugError if it is another medium's; RecoveryFileError; KernelError, also if there
    is no directory for the file.
    """
    if not os.path.lexists(path):
        with _parent(path):
            return None
    with _recovered_for(path, about, length) as (identifier, _):
        return FoundRecovery(identifier, _is_unsettled(path))


def require_unsettled(found: FoundRecovery | None, path: Path) -> None:
    """Check that only an interrupted run can have made the file. Raises: HotplugError."""
    if found is not None and not found.is_unsettled:
        raise HotplugError(
            f"write {shown(path)}: it exists, and is not of a run that was interrupted; it is not "
            "overwritten, and its key is not used again: name another file"
        )


@contextmanager
def recovery_key(
    path: Path,
    found: FoundRecovery | None,
    about: Callable[[str], recovery_files.About],
    length: int,
) -> Iterator[tuple[str, SecretBytes]]:
    """Yield identifier and key of the recovery file that was found; write a new one if none was.

    Raises: HotplugError if the file is not the one that was found, or is settled; KernelError.
    """
    if found is None:
        identifier = str(uuid4())
        with memory.random_key(length) as key:
            write_recovery(path, about(identifier), key)
            yield identifier, key
        return
    require_unsettled(found, path)
    with _recovered_for(path, about, length) as (identifier, key):
        if FoundRecovery(identifier, _is_unsettled(path)) != found:
            raise HotplugError(f"use {shown(path)}: it was replaced meanwhile; try again")
        yield identifier, key


def settle_recovery(path: Path) -> None:
    """Settle the recovery file, as a medium relies on its key. Raises: KernelError."""
    with _parent(path) as parent:
        if atomic_files.is_unsettled(parent, path.name):
            atomic_files.settle(parent, path)


def _is_unsettled(path: Path) -> bool:
    with _parent(path) as parent:
        return atomic_files.is_unsettled(parent, path.name)


@contextmanager
def _recovered_for(
    path: Path, about: Callable[[str], recovery_files.About], length: int
) -> Iterator[tuple[str, SecretBytes]]:
    """Yield identifier and key of the medium's recovery file. Raises: HotplugError if another's."""
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
    """Yield a recovery file's description and key, in locked memory that is overwritten at the end.

    With `only_roots`, the file must be root's alone, and no link. Raises: RecoveryFileError;
    KernelError.
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
