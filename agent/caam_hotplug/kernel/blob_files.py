"""Blobs' files, in a directory that only root can write to."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from caam_hotplug.errors import BlobError, BlobMissingError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import paths


def read(directory: Path, name: str, wanted: blobs.Backend | None = None) -> blobs.Blob:
    """Read the blob in a file, in the wanted form or in any.

    The file is opened without following a link and without waiting, and must be a regular file
    of plausible size. Raises: BlobMissingError; BlobError for everything that is no blob;
    UnsafePathError for the directory.
    """
    path = directory / name
    try:
        with paths.directory(directory) as parent:
            return _read(path, wanted, name, parent)
    except FileNotFoundError as error:
        raise BlobMissingError(f"no blob {path}") from error


def read_anyones(path: Path) -> blobs.Blob:
    """Read the blob in a file that anyone may write to, to inspect it. Raises: as `read`."""
    try:
        return _read(path, None, str(path), None)
    except FileNotFoundError as error:
        raise BlobMissingError(f"no blob {path}") from error


def _read(path: Path, wanted: blobs.Backend | None, name: str, parent: int | None) -> blobs.Blob:
    """Read the file. Raises: FileNotFoundError; BlobError."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        file = os.open(name, flags, dir_fd=parent)
    except FileNotFoundError:
        raise
    except OSError as error:
        cause = (
            "is a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        )
        raise BlobError(f"read blob {path}: {cause}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BlobError("is not a regular file")
        if status.st_size > blobs.MAX_BYTES:
            raise BlobError(f"has {status.st_size} bytes, a blob at most {blobs.MAX_BYTES}")
        return blobs.parse(os.read(file, blobs.MAX_BYTES + 1), wanted)
    except OSError as error:
        raise BlobError(f"read blob {path}: {os.strerror(error.errno or 0)}") from error
    except BlobError as error:
        raise BlobError(f"read blob {path}: {error}") from error
    finally:
        os.close(file)
