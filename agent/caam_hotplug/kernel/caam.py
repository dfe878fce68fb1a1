"""NXP's /dev/caam-keygen: a black blob is made, or becomes a tagged key of this boot.

    offset  field of the ioctl's struct, 56 bytes on 32- and 64-bit machines
    0       u8  key_enc_len, NUL included
    1       u8  key_mode_len, NUL included
    2       u16 key_value_len, without a NUL
    4       u32 black_key_len   in: room, out: length
    8       u64 pointers to key_enc, key_mode, key_value, black_key
    40      u32 blob_len        in: length or room, out: length; then 4 bytes of padding
    48      u64 pointer to blob

    offset  field of the tag header, in host order
    0       u32 magic 0x5461674f
    4       u32 version, 0
    8       u32 type: bit 0 black, bit 2 trusted descriptor, bit 3 CCM
    12      u32 length of the red key, in bytes
    16      u32 length of the object that follows, in bytes

Source: the caam_keygen driver of NXP's kernels (linux-imx, drivers/crypto/caam/caamkeygen.c).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from caam_hotplug.errors import BlobError, BlobMissingError, BlobRejectedError, CaamError
from caam_hotplug.kernel import paths
from caam_hotplug.model import SecretBytes

_KEYGEN: Final = struct.Struct("=BBHIQQQQIxxxxQ")
_IOCTL_CREATE: Final = 0xC0384B00
_IOCTL_IMPORT: Final = 0xC0384B01

_TAG: Final = struct.Struct("=5I")
_TAG_MAGIC: Final = 0x5461674F
_BLOB_OVERHEAD: Final = 48
_CCM_OVERHEAD: Final = 12
_TYPE_CCM: Final = 1 << 3
_KEY_BYTES: Final = range(16, 65)

Seal = Literal["ecb", "ccm"]
"""How the CAAM covers the black key in memory; a `ccm` key notices that it was changed."""

BLOB_MAX_BYTES: Final = _TAG.size + _KEY_BYTES[-1] + _CCM_OVERHEAD + _BLOB_OVERHEAD
"""No blob is longer. Some kernels copy the length they are told into a fixed buffer, so nothing
longer may ever be handed to the ioctl."""
_TAGGED_KEY_MAX_BYTES: Final = _TAG.size + _KEY_BYTES[-1] + _CCM_OVERHEAD


def read_blob(directory: Path, name: str) -> bytes:
    """The bytes of a black blob's file, whose form is what keygen writes.

    The file is opened without following a link and without waiting, and must be a regular file
    of plausible size. Raises: BlobMissingError; BlobError for everything that is no blob;
    UnsafePathError for the directory.
    """
    path = directory / name
    try:
        with paths.directory(directory) as parent:
            file = os.open(
                name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=parent
            )
    except FileNotFoundError as error:
        raise BlobMissingError(f"no blob {path}") from error
    except OSError as error:
        cause = (
            "is a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        )
        raise BlobError(f"read blob {path}: {cause}") from error
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            raise BlobError(f"read blob {path}: is not a regular file")
        if status.st_size > BLOB_MAX_BYTES:
            raise BlobError(
                f"read blob {path}: has {status.st_size} bytes, a black blob at most "
                f"{BLOB_MAX_BYTES}"
            )
        blob = os.read(file, BLOB_MAX_BYTES + 1)
    except OSError as error:
        raise BlobError(f"read blob {path}: {os.strerror(error.errno or 0)}") from error
    finally:
        os.close(file)
    fault = _fault(blob)
    if fault is not None:
        raise BlobError(f"read blob {path}: {fault}")
    return blob


@dataclass(frozen=True, slots=True)
class Header:
    """What a blob says of itself; nothing of it is secret."""

    type: int
    seal: Seal
    key_bytes: int
    blob_bytes: int
    """Without the tag header."""


def header(blob: bytes) -> Header:
    """The tag header of a blob that `read_blob` has taken."""
    _, _, kind, red_bytes, object_bytes = _TAG.unpack_from(blob)
    return Header(kind, "ccm" if kind & _TYPE_CCM else "ecb", red_bytes, object_bytes)


def _fault(blob: bytes) -> str | None:
    if len(blob) < _TAG.size:
        return f"is cut short: {len(blob)} bytes, the tag header alone has {_TAG.size}"
    magic, version, _, red_bytes, object_bytes = _TAG.unpack_from(blob)
    if magic != _TAG_MAGIC or version != 0:
        return "is not a black blob of caam-keygen (no tag header)"
    if red_bytes not in _KEY_BYTES:
        return f"names a key of {red_bytes} bytes; black keys have 16 to 64"
    if len(blob) != _TAG.size + object_bytes:
        return (
            f"is cut short or damaged: {len(blob)} bytes, the tag header says "
            f"{_TAG.size + object_bytes}"
        )
    if object_bytes < red_bytes + _BLOB_OVERHEAD:
        return "is a black key, not a blob; caam-keygen writes the blob beside it, as NAME.bb"
    return None


def import_blob(device: Path, blob: bytes) -> SecretBytes:
    """The tagged key of this boot that the blob holds: tag header and black key.

    The caller wipes it. Raises: BlobRejectedError if the CAAM does not take the blob; CaamError
    for anything else. Blocks for a job of the CAAM.
    """
    if len(blob) > BLOB_MAX_BYTES:
        raise BlobError(f"a black blob has at most {BLOB_MAX_BYTES} bytes, not {len(blob)}")
    source = ctypes.create_string_buffer(blob, len(blob))
    # No name ever stands for the bytes themselves, so that no traceback can show them.
    with SecretBytes(bytearray(_TAGGED_KEY_MAX_BYTES)) as black:
        target = (ctypes.c_char * len(black)).from_buffer(black.buffer)
        request = bytearray(
            _KEYGEN.pack(
                0, 0, 0, len(black), 0, 0, 0, ctypes.addressof(target), len(blob),
                ctypes.addressof(source),
            )
        )  # fmt: skip
        try:
            _ask(device, _IOCTL_IMPORT, request)
        except CaamError:
            raise
        except OSError as error:
            raise _refusal(device, error) from error
        length = _KEYGEN.unpack(request)[3]
        del target
        return SecretBytes(black.buffer[:length])


def create_blob(device: Path, seal: Seal, key: int | SecretBytes) -> bytes:
    """A black blob of a new key of so many bytes, which nobody has seen, or of the key given.

    A key that is given must not have a zero byte: the driver takes it as a text. Raises: CaamError
    with the driver's own words. Blocks for a job of the CAAM.
    """
    covering = ctypes.create_string_buffer(seal.encode())
    mode = ctypes.create_string_buffer(b"-s" if isinstance(key, int) else b"-t")
    value = bytearray(str(key).encode()) if isinstance(key, int) else key.buffer
    if 0 in value:
        raise ValueError("a key that is given must not have a zero byte")
    given = (ctypes.c_char * len(value)).from_buffer(value)
    blob = ctypes.create_string_buffer(BLOB_MAX_BYTES)
    with SecretBytes(bytearray(_TAGGED_KEY_MAX_BYTES)) as black:
        target = (ctypes.c_char * len(black)).from_buffer(black.buffer)
        request = bytearray(
            _KEYGEN.pack(
                len(covering), len(mode), len(given), len(black), ctypes.addressof(covering),
                ctypes.addressof(mode), ctypes.addressof(given), ctypes.addressof(target),
                len(blob), ctypes.addressof(blob),
            )
        )  # fmt: skip
        try:
            _ask(device, _IOCTL_CREATE, request)
        except CaamError:
            raise
        except OSError as error:
            words = blob.value.decode(errors="replace").strip()
            told = words if words.isprintable() else ""
            raise CaamError("create a key with", str(device), error.errno or 0, told) from error
        finally:
            del given, target
    made = blob.raw[: _KEYGEN.unpack(request)[8]]
    fault = _fault(made)
    if fault is not None:
        raise CaamError("create a key with", str(device), errno.EBADMSG, f"its blob {fault}")
    return made


def _ask(device: Path, request: int, struct: bytearray) -> None:
    """The driver has answered. Raises: CaamError if it is not there; OSError from the ioctl."""
    try:
        file = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "is the kernel's caam_keygen driver there?"
        raise CaamError("open", str(device), error.errno or 0, hint) from error
    try:
        fcntl.ioctl(file, request, struct)
    finally:
        os.close(file)


def _refusal(device: Path, error: OSError) -> BlobRejectedError | CaamError:
    match error.errno:
        case errno.EBADMSG:
            return BlobRejectedError(
                "the CAAM refused the blob: damaged, sealed on another chip, "
                "or sealed in another security state of this one"
            )
        case errno.EINVAL:
            return BlobRejectedError("the CAAM refused the blob: it has no valid form")
    return CaamError("import blob", str(device), error.errno or 0)
