"""NXP's /dev/caam-keygen: it creates black blobs, and imports them as tagged keys of this boot.

    offset  field of the ioctl's struct, 56 bytes on 32- and 64-bit machines
    0       u8  key_enc_len, NUL included
    1       u8  key_mode_len, NUL included
    2       u16 key_value_len, without a NUL
    4       u32 black_key_len   in: room, out: length
    8       u64 pointers to key_enc, key_mode, key_value, black_key
    40      u32 blob_len        in: length or room, out: length; then 4 bytes of padding
    48      u64 pointer to blob

Source: the caam_keygen driver of NXP's kernels (linux-imx, drivers/crypto/caam/caamkeygen.c).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from caam_hotplug.errors import BlobError, BlobRejectedError, CaamError
from caam_hotplug.formats import blobs
from caam_hotplug.model import SecretBytes

_KEYGEN: Final = struct.Struct("=BBHIQQQQIxxxxQ")
_IOCTL_CREATE: Final = 0xC0384B00
_IOCTL_IMPORT: Final = 0xC0384B01


def import_blob(device: Path, blob: bytes) -> SecretBytes:
    """Return the blob's tagged key of this boot: tag header and black key.

    The caller wipes it. Raises: BlobRejectedError if the CAAM does not take the blob; CaamError
    for anything else. Blocks for a job of the CAAM.
    """
    if len(blob) > blobs.TAGGED_MAX_BYTES:
        raise BlobError(f"a black blob has at most {blobs.TAGGED_MAX_BYTES} bytes, not {len(blob)}")
    source = ctypes.create_string_buffer(blob, len(blob))
    # No name ever stands for the bytes themselves, so that no traceback can show them.
    with SecretBytes(bytearray(blobs.TAGGED_KEY_MAX_BYTES)) as black:
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


def create_blob(device: Path, seal: blobs.Seal, key: int | SecretBytes) -> bytes:
    """Return a black blob of a new key of so many bytes, or of the given key.

    A given key must not have a zero byte: the driver takes it as a text. Raises: CaamError
    with the driver's own words. Blocks for a job of the CAAM.
    """
    covering = ctypes.create_string_buffer(seal.encode())
    mode = ctypes.create_string_buffer(b"-s" if isinstance(key, int) else b"-t")
    value = bytearray(str(key).encode()) if isinstance(key, int) else key.buffer
    if 0 in value:
        raise ValueError("a given key must not have a zero byte")
    given = (ctypes.c_char * len(value)).from_buffer(value)
    blob = ctypes.create_string_buffer(blobs.TAGGED_MAX_BYTES)
    with SecretBytes(bytearray(blobs.TAGGED_KEY_MAX_BYTES)) as black:
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
            detail = words if words.isprintable() else ""
            raise CaamError("create a key with", str(device), error.errno or 0, detail) from error
        finally:
            del given, target
    made = blob.raw[: _KEYGEN.unpack(request)[8]]
    try:
        blobs.parse(made, "tagged")
    except BlobError as error:
        detail = f"its blob {error}"
        raise CaamError("create a key with", str(device), errno.EBADMSG, detail) from error
    return made


def _ask(device: Path, request: int, struct: bytearray) -> None:
    """Send the driver a request. Raises: CaamError if it is not there; OSError from the ioctl."""
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
