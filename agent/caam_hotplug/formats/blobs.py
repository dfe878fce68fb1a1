"""Sealed keys in their three forms, distinguished by their bytes. Pure.

    form       made by                  bytes
    tagged     NXP's caam-keygen        a tag header, then the black blob
    trusted    key type `trusted`       the sealed blob in hex, as keyctl pipe prints it; or raw,
                                        which its bytes do not tell
    encrypted  key type `encrypted`     FORMAT trusted:MASTER LENGTH HEX, as keyctl pipe prints it

    offset  field of the tag header, in host order
    0       u32 magic 0x5461674f
    4       u32 version, 0
    8       u32 type: bit 0 black, 1 blob, 2 trusted descriptors, 3 CCM, 4 secure memory, 5-6 state
    12      u32 length of the red key, in bytes
    16      u32 length of the object that follows, in bytes

Source: the caam_keygen driver of NXP's kernels (linux-imx, drivers/crypto/caam/caamkeygen.c and
tag_object.h); trusted-encrypted.rst in the kernel's documentation.
"""

from __future__ import annotations

import re
import string
import struct
from dataclasses import dataclass
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.errors import BlobError
from caam_hotplug.model import KeyType

Backend = Literal["tagged", "trusted", "encrypted"]
Seal = Literal["ecb", "ccm"]
"""Encryption of a black key in memory; the CAAM notices a changed key with `ccm` only."""

MAX_BYTES: Final = 4096
"""Longest file of a blob, in any form."""

_TAG: Final = struct.Struct("=5I")
_TAG_MAGIC: Final = 0x5461674F
_SEALS: Final[dict[int, Seal]] = {1: "ecb", 9: "ccm"}
"""Types of a black key, by its seal. The driver takes all others, too."""
_TYPE_BITS: Final = (
    (1 << 2, "for trusted descriptors"),
    (1 << 4, "in secure memory"),
    (1 << 5, "of the secure state"),
    (1 << 6, "of the trusted state"),
    (~0x7F, "with unknown bits"),
)
_BLOB_OVERHEAD: Final = 48
_CCM_OVERHEAD: Final = 12
_KEY_BYTES: Final = range(16, 65)
TAGGED_KEY_MAX_BYTES: Final = _TAG.size + _KEY_BYTES[-1] + _CCM_OVERHEAD
TAGGED_MAX_BYTES: Final = TAGGED_KEY_MAX_BYTES + _BLOB_OVERHEAD
"""Longest blob that caam-keygen may be given: some kernels copy any length into a fixed buffer."""

_TRUSTED_MAX_BYTES: Final = 512
"""MAX_BLOB_SIZE of keys/trusted-type.h."""
TRUSTED_KEY_BYTES: Final = range(32, 129)
"""MIN_KEY_SIZE to MAX_KEY_SIZE of keys/trusted-type.h."""
_ENCRYPTED: Final = re.compile(
    r"(?P<format>default|enc32) (?P<master>\S+) (?P<length>\d{1,4}) (?P<sealed>(?:[0-9a-fA-F]{2})+)"
)
_ENCRYPTED_FORMATS: Final = (b"default ", b"enc32 ", b"ecryptfs ")
ENCRYPTED_KEY_BYTES: Final = range(20, 129)
"""From MIN_DATA_SIZE of encrypted.c to the longest that dm-crypt takes for a cipher of Linux's."""


@dataclass(frozen=True, slots=True)
class Tagged:
    """A tag header and a black blob. No part is secret."""

    content: bytes
    type: int
    seal: Seal
    key_bytes: int
    """Length of the key itself, not of the tagged key that dm-crypt gets."""

    @property
    def blob_bytes(self) -> int:
        """Length of the black blob, without the tag header."""
        return len(self.content) - _TAG.size


@dataclass(frozen=True, slots=True)
class Trusted:
    """A key that a trust source, such as the CAAM, has sealed for the kernel. No part is secret."""

    content: bytes
    """Sealed bytes, not in hex."""

    @property
    def key_bytes(self) -> int | None:
        """Length of the key if the CAAM has sealed it, which adds 48 bytes; None if it cannot have.

        The blob of another trust source may have such a length, too.
        """
        length = len(self.content) - _BLOB_OVERHEAD
        return length if length in TRUSTED_KEY_BYTES else None


@dataclass(frozen=True, slots=True)
class Encrypted:
    """A key encrypted under a trusted one, the master. No part is secret."""

    content: bytes
    """Text that the kernel loads."""
    format: str
    master: str
    """Description of the trusted key, and name of its blob without the ending."""
    key_bytes: int


Blob = Tagged | Trusted | Encrypted

KEY_TYPES: Final[dict[Backend, KeyType]] = {
    "tagged": "logon",
    "trusted": "trusted",
    "encrypted": "encrypted",
}
"""Type that the key of a blob has in a keyring, by the blob's backend."""


def backend_of(blob: Blob) -> Backend:
    """Name the backend that made the blob and loads it."""
    match blob:
        case Tagged():
            return "tagged"
        case Trusted():
            return "trusted"
        case Encrypted():
            return "encrypted"


def key_of(backend: Backend) -> str:
    """Name a key of this backend, with its article."""
    return f"{'an' if backend == 'encrypted' else 'a'} {backend} key"


def parse(content: bytes, wanted: Backend | None = None) -> Blob:
    """Read a blob in the form that is wanted, or in any form.

    Raises: BlobError with the mistake; the caller knows the file.
    """
    blob = _parsed(content, wanted)
    if wanted is not None and backend_of(blob) != wanted:
        raise BlobError(f"is {key_of(backend_of(blob))}'s blob, and the rule asks for {wanted!r}")
    return blob


def _parsed(content: bytes, wanted: Backend | None) -> Blob:
    """Read a blob in the form that its bytes tell. Raises: BlobError."""
    text = content.strip()
    if _has_tag(content) if wanted != "trusted" else _is_tagged(content):
        return _tagged(content)
    if text.startswith(_ENCRYPTED_FORMATS):
        return _encrypted(text)
    if text and all(byte in string.hexdigits.encode() for byte in text):
        return _trusted_of_hex(text)
    if wanted == "trusted":  # raw bytes have no header
        return _trusted(content)
    if wanted == "tagged" or len(content) < _TAG.size:
        return _tagged(content)
    raise BlobError(
        "is no blob: neither one of caam-keygen (no tag header), nor what keyctl pipe prints of a "
        "trusted or an encrypted key; a raw one of a trusted key needs backend = 'trusted'"
    )


def _has_tag(content: bytes) -> bool:
    """Whether it starts with a tag header whose magic and length are not both damaged."""
    if len(content) < _TAG.size:
        return False
    magic, _, _, _, object_bytes = _TAG.unpack_from(content)
    return bool(magic == _TAG_MAGIC or _TAG.size + object_bytes == len(content))


def _is_tagged(content: bytes) -> bool:
    """Whether it is a tagged blob for certain: raw bytes would have to agree in twelve bytes."""
    if len(content) < _TAG.size:
        return False
    magic, version, _, _, object_bytes = _TAG.unpack_from(content)
    return bool(magic == _TAG_MAGIC and version == 0 and _TAG.size + object_bytes == len(content))


def _tagged(content: bytes) -> Tagged:
    """Read a tag header and a black blob. Raises: BlobError."""
    if len(content) < _TAG.size:
        raise BlobError(f"is cut short: {len(content)} bytes, the tag header alone has {_TAG.size}")
    magic, version, kind, red_bytes, object_bytes = _TAG.unpack_from(content)
    if magic != _TAG_MAGIC or version != 0:
        raise BlobError("is not a black blob of caam-keygen (no tag header)")
    if kind not in _SEALS:
        raise BlobError(
            f"has tag type {kind}: {_meaning(kind)}; tk(...) needs a black key, type 1 (ECB) or "
            "9 (CCM)"
        )
    if red_bytes not in _KEY_BYTES:
        raise BlobError(f"names a key of {red_bytes} bytes; black keys have 16 to 64")
    if len(content) != _TAG.size + object_bytes:
        raise BlobError(
            f"is cut short or damaged: {len(content)} bytes, the tag header says "
            f"{_TAG.size + object_bytes}"
        )
    if len(content) > TAGGED_MAX_BYTES:
        raise BlobError(f"has {len(content)} bytes, a black blob at most {TAGGED_MAX_BYTES}")
    if object_bytes < red_bytes + _BLOB_OVERHEAD:
        raise BlobError(
            "is a black key, not a blob; caam-keygen writes the blob beside it, as NAME.bb"
        )
    return Tagged(content, kind, _SEALS[kind], red_bytes)


def _meaning(kind: int) -> str:
    """Say what a tag type means."""
    color, what = "black" if kind & 1 else "red", "blob" if kind & 2 else "key"
    cover = "CCM" if kind & 8 else "ECB"
    more = [words for bits, words in _TYPE_BITS if kind & bits]
    return ", ".join([f"{color} {what}", cover, *more])


def _trusted_of_hex(text: bytes) -> Trusted:
    """Read a trusted key's blob in hex. Raises: BlobError."""
    if len(text) % 2:
        raise BlobError(f"is cut short: {len(text)} hex digits, half a byte too few")
    return _trusted(bytes.fromhex(text.decode()))


def _trusted(content: bytes) -> Trusted:
    """Read a trusted key's raw blob. Raises: BlobError."""
    if not _BLOB_OVERHEAD < len(content) <= _TRUSTED_MAX_BYTES:
        raise BlobError(
            f"is cut short or no trusted key's blob: {len(content)} bytes, expected "
            f"{_BLOB_OVERHEAD + 1} to {_TRUSTED_MAX_BYTES}"
        )
    return Trusted(content)


def _encrypted(text: bytes) -> Encrypted:
    """Read an encrypted key as keyctl pipe prints it. Raises: BlobError."""
    found = _ENCRYPTED.fullmatch(text.decode("ascii", "replace"))
    if found is None:
        raise BlobError(
            "is cut short or damaged: expected FORMAT trusted:MASTER LENGTH HEX, with the format "
            "default or enc32, as keyctl pipe prints an encrypted key"
        )
    kind, _, master = found["master"].partition(":")
    if kind != "trusted":
        raise BlobError(
            f"is encrypted under {kind}:, and only a trusted key keeps such a key to this board"
        )
    reason = names.why_unsafe(master)
    if reason is not None:
        raise BlobError(f"names a master {master!a} that cannot be a file's name: {reason}")
    length = int(found["length"])
    if length not in ENCRYPTED_KEY_BYTES:
        raise BlobError(f"names a key of {length} bytes, expected 20 to 128")
    return Encrypted(text, found["format"], master, length)
