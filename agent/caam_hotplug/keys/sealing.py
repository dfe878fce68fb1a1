"""Seal keys on this board, by one of its kernel's seal methods."""

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
"""Default lengths of keys, which suit the default ciphers."""

MASTER: Final = "master"
"""The default name of the master key."""
MASTER_KEY_BYTES: Final = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SealMethod:
    """How a key is to be sealed."""

    backend: blobs.Backend
    seal: blobs.Seal = "ecb"
    """For a tagged key."""
    master: str = MASTER
    """For an encrypted key: the name of its master's blob without the ending."""
    options: str = ""
    """Options of the trust source for a trusted key or a master, such as
    `keyhandle=0x81000001` for a TPM."""


def backend_here(wanted: Literal["auto"] | blobs.Backend) -> blobs.Backend:
    """Return the wanted backend. `auto`: NXP's, or trusted keys where the kernel has only them."""
    if wanted != "auto":
        return wanted
    return "trusted" if not names.CAAM_DEVICE.exists() and trusted.is_offered() else "tagged"


def require_given(method: SealMethod) -> None:
    """Check that the method can seal a given key, such as a recovery key. Raises: HotplugError."""
    if method.backend == "trusted":
        raise HotplugError(
            "seal a recovery key: the kernel makes its trusted keys itself and shows them to "
            "nobody; take an encrypted key, which has a master, or no recovery key"
        )


def require_fit(method: SealMethod, cipher: str, length: int) -> None:
    """Check that a medium's cipher and key length work with this method. Raises: HotplugError."""
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
    """Check that the blob of the method's master is there. Raises: MasterKeyError."""
    if method.backend == "encrypted":
        _master(method.master, directory)


def seal(method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
    """Seal a key, and return the blob's content. `key`: the key, or the length of a new one.

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
