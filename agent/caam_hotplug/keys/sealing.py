"""A key that a blob is made of: sealed by this board, in the way that its kernel has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast

from caam_hotplug import names
from caam_hotplug.errors import BlobError, HotplugError, MasterKeyError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blob_files, caam, trusted
from caam_hotplug.model import SecretBytes

KEY_BYTES: Final[dict[blobs.Backend, int]] = {"tagged": 16, "trusted": 64, "encrypted": 64}
"""How long a key is unless it is said: as the cipher likes it that is used then."""

MASTER: Final = "master"
"""The master key's name unless it is said."""
MASTER_KEY_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SealMethod:
    """How a key is to be sealed."""

    backend: blobs.Backend
    seal: blobs.Seal = "ecb"
    """Of a tagged key."""
    master: str = MASTER
    """Of an encrypted key: the name of its master's blob without the ending."""
    options: str = ""
    """What the trust source needs for a trusted key or a master, such as
    `keyhandle=0x81000001` of a TPM."""


def backend_here(wanted: Literal["auto"] | blobs.Backend) -> blobs.Backend:
    """The one that is wanted; else NXP's, or the kernel's trusted keys where only they are."""
    if wanted != "auto":
        return wanted
    return "trusted" if not names.CAAM_DEVICE.exists() and trusted.is_offered() else "tagged"


def require_given(method: SealMethod) -> None:
    """A key can be given to be sealed, as a recovery key is. Raises: HotplugError."""
    if method.backend == "trusted":
        raise HotplugError(
            "seal a recovery key: the kernel makes its trusted keys itself and shows them to "
            "nobody; take an encrypted key, which has a master, or no recovery key"
        )


def require_fit(method: SealMethod, cipher: str, length: int) -> None:
    """A key of that length, of a medium with that cipher, can be used when it is sealed this way.

    Raises: HotplugError.
    """
    if method.backend == "tagged" and not cipher.startswith("capi:tk("):
        raise HotplugError(
            f"seal a key for {cipher}: a tagged key works with the CAAM's ciphers alone, such as "
            "capi:tk(cbc(aes))-plain; use --backend encrypted on a mainline kernel"
        )
    if method.backend == "encrypted" and length not in blobs.ENCRYPTED_KEY_BYTES:
        raise HotplugError(
            f"seal a key of {length} bytes: the kernel encrypts keys of "
            f"{blobs.ENCRYPTED_KEY_BYTES[0]} bytes and more; this medium opens with a tagged "
            "key or on a PC"
        )


def require_master(method: SealMethod, directory: Path) -> None:
    """The blob of the master that the way needs is there. Raises: MasterKeyError."""
    if method.backend == "encrypted":
        _master(method.master, directory)


def seal(method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
    """The blob's file of a new key of so many bytes that nobody has seen, or of the key given.

    `directory` has the blob of the master. Raises: HotplugError; CaamError; KeyringError.
    """
    if method.backend != "tagged":
        trusted.is_offered(blobs.KEY_TYPES[method.backend])  # and loaded
    match method.backend:
        case "tagged":
            return caam.create_blob(names.CAAM_DEVICE, method.seal, key)
        case "trusted":
            if not isinstance(key, int):
                require_given(method)
            return trusted.seal_trusted(cast(int, key), method.options)
    master = _master(method.master, directory)
    return trusted.seal_encrypted(key, master, method.master, method.options)


def _master(name: str, directory: Path) -> blobs.Trusted:
    try:
        return cast(blobs.Trusted, blob_files.read(directory, f"{name}.bb", "trusted"))
    except BlobError as error:
        raise MasterKeyError(
            f"use the master key {name}: {error}; `caam-hotplug key create {name} --backend "
            f"trusted --key-bytes {MASTER_KEY_BYTES}` makes one"
        ) from error
