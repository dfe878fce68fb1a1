"""The record of a partition that `provision` has not finished: a file beside the blobs.

It has the blob, which gets its own name when the partition is finished. Until then the agent finds
no blob and leaves the partition alone, also where its table has no room for a mark.
"""

from __future__ import annotations

import binascii
import json
import os
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, get_type_hints

from caam_hotplug import names
from caam_hotplug.config.convert import converted
from caam_hotplug.errors import HotplugError, KernelError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Backend
from caam_hotplug.kernel import atomic_files, paths
from caam_hotplug.kernel.partition_table import Place

_MAX_BYTES: Final = 16 << 10
_SUFFIX: Final = ".provision"
_MODE: Final = 0o600
_OPEN: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What was begun, and where. None of it is secret."""

    version: Literal[1] = 1
    disk: str
    """The identifier in the disk's table."""
    serial: str | None
    """The disk's own; cards with the same image have the same identifier."""
    number: int
    start: int
    length: int
    """With start: the partition's place on its disk, in 512-byte sectors."""
    partuuid: str
    """By which the partition is found, should its label have changed already."""
    settings: str
    """The options that its filesystem is made with."""
    backend: Backend
    blob: bytes
    digest: str
    """Of the blob, by which a torn record is known."""
    recovery: str | None
    """The identifier of the recovery file."""

    @property
    def parsed_blob(self) -> blobs.Blob:
        """The blob that the partition gets. Raises: BlobError."""
        return blobs.parse(self.blob, self.backend)

    def is_of(self, disk: str, serial: str | None, place: Place) -> bool:
        """Whether the record is of the partition at this place of the disk."""
        here = disk, serial, place.number, place.start, place.size
        return here == (self.disk, self.serial, self.number, self.start, self.length)

    def to_json(self) -> bytes:
        """Encode the record, for `from_json`."""
        return json.dumps(asdict(self), default=_to_text).encode()

    @classmethod
    def from_json(cls, content: bytes) -> Record:
        """Decode a record. Raises: ValueError for any text that this version has not written."""
        found, kinds = json.loads(content), get_type_hints(cls)
        if not isinstance(found, dict) or found.keys() != kinds.keys():
            raise ValueError("it has other fields")
        made = cls(**{key: converted(found[key], kinds[key], _from_text) for key in kinds})
        if made.digest != digest_of(made.blob):
            raise ValueError("its blob does not have its digest")
        return made


def digest_of(blob: bytes) -> str:
    """Return the digest of a blob, as the record has it."""
    return sha256(blob).hexdigest()


def file(directory: Path, blob: str) -> Path:
    """Return the path of the record for the blob of that file name."""
    return directory / f".{blob}{_SUFFIX}"


def find(directory: Path, blob: str) -> Record | None:
    """Read the record for the blob of that file name, if there is one.

    Raises: HotplugError for a file that is no record; UnsafePathError; KernelError.
    """
    path = file(directory, blob)
    try:
        with paths.directory(directory) as parent:
            opened = os.open(path.name, _OPEN, dir_fd=parent)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise KernelError("open", shown(path), error.errno or 0) from error
    try:
        return Record.from_json(os.pread(opened, _MAX_BYTES, 0))
    except OSError as error:
        raise KernelError("read", shown(path), error.errno or 0) from error
    except (ValueError, RecursionError) as error:
        raise HotplugError(
            f"read {shown(path)}: it is no record of this version of {names.PROGRAM} ({error}); "
            "if no partition needs it, move it away"
        ) from error
    finally:
        os.close(opened)


def create(opened: int, directory: Path, blob: str, record: Record) -> None:
    """Write the record, and sync it. `opened`: the blob directory.

    Raises: HotplugError if there is one already; KernelError.
    """
    atomic_files.write(opened, file(directory, blob), record.to_json(), _MODE)


def remove(opened: int, directory: Path, blob: str) -> None:
    """Remove the record, if it is there. Raises: KernelError."""
    if atomic_files.exists(opened, file(directory, blob).name):
        atomic_files.remove(opened, file(directory, blob))


def _to_text(value: bytes) -> str:
    return binascii.b2a_base64(value, newline=False).decode()


def _from_text(_wanted: Any, value: Any) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found a {type(value).__name__}")  # noqa: TRY004
    return binascii.a2b_base64(value, strict_mode=True)
