"""The journal of a migration: a file beside the blobs, from the first write to the last."""

from __future__ import annotations

import binascii
import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints
from uuid import UUID

from caam_hotplug import names
from caam_hotplug.config.convert import converted
from caam_hotplug.errors import HotplugError, KernelError, shown
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.kernel import atomic_files, paths
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.gpt import Identity
from caam_hotplug.provisioning.reencryption import Journal, beginning

_HEAD_BYTES: Final = 16 << 10
_SUFFIX: Final = ".migration"
_OPEN: Final = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The migration's unchanging facts. None of them is secret."""

    version: Literal[1] = 1
    mark: UUID
    """The identifier of the partition until it is finished."""
    name: str
    type: UUID
    uuid: UUID
    """With name and type: the partition's identity before and afterwards."""
    start: int
    length: int
    """With start: the partition's place on its disk, in 512-byte sectors."""
    blob: str
    """The name of the blob's file. It has the old blob until all bytes have moved."""
    before: Backend
    after: Backend
    old_blob: bytes
    new_blob: bytes
    how: str
    """The settings of the rule that encrypt the medium, before and afterwards."""
    recovery_file: str | None
    """The recovery file of the new key."""

    @property
    def identity(self) -> Identity:
        """The partition's identity when it is finished."""
        return Identity(self.name, self.type, self.uuid)

    def to_json(self) -> bytes:
        """Encode the head, for `from_json`."""
        return json.dumps(asdict(self), default=_to_text).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Head:
        """Decode a head. Raises: ValueError for any text that this version has not written."""
        found, kinds = json.loads(content), get_type_hints(cls)
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError("it has other fields")
        return cls(**{key: converted(found[key], kinds[key], _from_text) for key in kinds})


def _to_text(value: UUID | bytes) -> str:
    if isinstance(value, bytes):
        return binascii.b2a_base64(value, newline=False).decode()
    return str(value)


def _from_text(wanted: Any, value: Any) -> UUID | bytes:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found a {type(value).__name__}")  # noqa: TRY004
    return UUID(value) if wanted is UUID else binascii.a2b_base64(value, strict_mode=True)


class Migration:
    """A migration that was begun, and its open journal."""

    def __init__(self, head: Head, blocks: Blocks) -> None:
        self.head = head
        self.journal = Journal(blocks)


def create(opened: int, directory: Path, head: Head) -> None:
    """Create the journal with its full size, and sync it. `opened`: the blob directory.

    Raises: HotplugError if there is one already; KernelError.
    """
    content = head.to_json()
    if len(content) > _HEAD_BYTES:
        raise HotplugError(f"migrate {shown(head.name)}: its names and blobs are too long")
    path = file(directory, head)
    atomic_files.write(opened, path, content.ljust(_HEAD_BYTES, b"\0") + beginning(), 0o600)


def remove(opened: int, directory: Path, head: Head) -> None:
    """Remove the journal. Raises: KernelError."""
    atomic_files.remove(opened, file(directory, head))


def file(directory: Path, head: Head) -> Path:
    """Return the journal's path."""
    return directory / f".{head.blob}{_SUFFIX}"


@contextmanager
def opened(directory: Path, head: Head) -> Iterator[Migration]:
    """Open and lock the journal, and read it from the disk instead of the cache.

    Raises: HotplugError if another process has it, or if it was replaced; KernelError.
    """
    path = file(directory, head)
    with _opened(path) as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HotplugError(f"go on by {shown(path)}: another `migrate` does already") from error
        # Another process may have finished and removed it between the two calls.
        if os.fstat(journal).st_nlink == 0 or _head(journal, path) != head:
            raise HotplugError(f"go on by {shown(path)}: it was replaced meanwhile; try again")
        blocks = Blocks(journal, shown(path), _HEAD_BYTES)
        blocks.refresh()
        yield Migration(head, blocks)


def heads(directory: Path) -> Iterator[Head]:
    """Yield the heads of all journals of this board, for migrations that are not finished.

    Raises: HotplugError for a file that is no journal; UnsafePathError; KernelError.
    """
    try:
        with paths.directory(directory) as parent:
            listed = sorted(os.listdir(parent))
    except FileNotFoundError:
        return
    for name in listed:
        if name.endswith(_SUFFIX):
            with _opened(directory / name) as journal:
                found = _head(journal, directory / name)
            yield found


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        with paths.directory(path.parent) as parent:
            opened = os.open(path.name, _OPEN, dir_fd=parent)
    except OSError as error:
        raise KernelError("open", shown(path), error.errno or 0) from error
    try:
        yield opened
    finally:
        os.close(opened)


def _head(journal: int, path: Path) -> Head:
    try:
        content = os.pread(journal, _HEAD_BYTES, 0)
        return Head.from_json(content.rstrip(b"\0"))
    except OSError as error:
        raise KernelError("read", shown(path), error.errno or errno.EIO) from error
    except (ValueError, RecursionError) as error:
        raise HotplugError(
            f"read {shown(path)}: it is no journal of this version of {names.PROGRAM} ({error}); "
            "if no medium needs it, move it away"
        ) from error
