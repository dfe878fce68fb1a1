"""The kinds of keys: how each is sealed on this board, and loaded from its blob into the kernel.

A new kind is a class here and an entry in `BACKENDS`; its blob's form is in `formats.blobs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, cast

from caam_hotplug import names
from caam_hotplug.config.rules import KeySource
from caam_hotplug.errors import BlobError, HotplugError, MasterKeyError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blob_files, caam, trusted
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import KeyReference, SecretBytes

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
    options: str = field(default="", repr=False)  # one may be a password
    """Options of the trust source for a trusted key or a master, such as
    `keyhandle=0x81000001` for a TPM."""


class Backend:
    """One kind of key. Unless a kind says otherwise, it seals any key, for any medium."""

    key_bytes: int
    """Default length of a key, which suits the default cipher."""

    def load(self, kernel: Kernel, blob: Any, source: KeySource, description: str) -> KeyReference:
        """Load the blob's key into the keyring. Raises: BlobRejectedError; HotplugError."""
        raise NotImplementedError

    def seal(self, method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
        """Seal a key, or a new one of this length. Raises: CaamError; KeyringError."""
        raise NotImplementedError

    def require_given(self) -> None:
        """Check that a given key can be sealed, such as a recovery key. Raises: HotplugError."""

    def require_fit(self, cipher: str, length: int) -> None:
        """Check that a medium's cipher and key length fit. Raises: HotplugError."""

    def require_master(self, method: SealMethod, directory: Path) -> None:
        """Check that the blob of the method's master is there. Raises: MasterKeyError."""


class TaggedKeys(Backend):
    """NXP's kernels: the CAAM makes a black key of the blob, which only its ciphers can use."""

    key_bytes = 16

    def load(
        self, kernel: Kernel, blob: blobs.Tagged, source: KeySource, description: str
    ) -> KeyReference:
        with kernel.import_blob(blob.content) as key:
            kernel.add_key(description, key)
            return KeyReference("logon", len(key))

    def seal(self, method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
        return caam.create_blob(names.CAAM_DEVICE, method.seal, key)

    def require_fit(self, cipher: str, length: int) -> None:
        if not cipher.startswith("capi:tk("):
            raise HotplugError(
                f"seal a key for {cipher}: a tagged key works with the CAAM's ciphers alone, such "
                "as capi:tk(cbc(aes))-plain; use --backend encrypted on a mainline kernel"
            )


class TrustedKeys(Backend):
    """Mainline kernels: the trust source unseals the blob for the kernel itself."""

    key_bytes = 64

    def load(
        self, kernel: Kernel, blob: blobs.Trusted, source: KeySource, description: str
    ) -> KeyReference:
        length = source.length or blob.key_bytes
        if not length:
            raise BlobError(
                "load the key: its blob does not tell the key's length, as no CAAM has sealed it; "
                "say it in the rule's key.length"
            )
        kernel.load_trusted_key(description, blob, source.options)
        return KeyReference("trusted", length)

    def seal(self, method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
        trusted.is_offered("trusted")  # and its module loaded
        if not isinstance(key, int):
            self.require_given()
        return trusted.seal_trusted(cast(int, key), method.options)

    def require_given(self) -> None:
        raise HotplugError(
            "seal a recovery key: the kernel makes its trusted keys itself and shows them to "
            "nobody; take an encrypted key, which has a master, or no recovery key"
        )


class EncryptedKeys(Backend):
    """Mainline kernels: one trusted master for the board, and under it a key for each medium."""

    key_bytes = 64

    def load(
        self, kernel: Kernel, blob: blobs.Encrypted, source: KeySource, description: str
    ) -> KeyReference:
        kernel.load_encrypted_key(description, blob, source.options)
        return KeyReference("encrypted", blob.key_bytes)

    def seal(self, method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
        trusted.is_offered("encrypted")  # and its module loaded
        master = _master(method.master, directory)
        return trusted.seal_encrypted(key, master, method.master, method.options)

    def require_fit(self, cipher: str, length: int) -> None:
        if length not in blobs.ENCRYPTED_KEY_BYTES:
            raise HotplugError(
                f"seal a key of {length} bytes: the kernel encrypts keys of "
                f"{blobs.ENCRYPTED_KEY_BYTES[0]} bytes and more; this medium opens with a tagged "
                "key or on a PC"
            )

    def require_master(self, method: SealMethod, directory: Path) -> None:
        _master(method.master, directory)


BACKENDS: Final[dict[blobs.Backend, Backend]] = {
    "tagged": TaggedKeys(),
    "trusted": TrustedKeys(),
    "encrypted": EncryptedKeys(),
}


def load(kernel: Kernel, blob: blobs.Blob, source: KeySource, description: str) -> KeyReference:
    """Load the key by the backend that the blob's form asks for."""
    return BACKENDS[blobs.backend_of(blob)].load(kernel, blob, source, description)


def seal(method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
    """Seal a key, and return the blob's content. `key`: the key, or the length of a new one.

    `directory` has the blob of the master. Raises: HotplugError; CaamError; KeyringError.
    """
    return BACKENDS[method.backend].seal(method, key, directory)


def backend_here(wanted: Literal["auto"] | blobs.Backend) -> blobs.Backend:
    """Return the wanted backend. `auto`: NXP's, or trusted keys where the kernel has only them."""
    if wanted != "auto":
        return wanted
    return "trusted" if not names.CAAM_DEVICE.exists() and trusted.is_offered() else "tagged"


def _master(name: str, directory: Path) -> blobs.Trusted:
    try:
        return cast(blobs.Trusted, blob_files.read(directory, f"{name}.bb", "trusted"))
    except BlobError as error:
        raise MasterKeyError(
            f"use the master key {name}: {error}; `caam-hotplug key create {name} --backend "
            f"trusted --key-bytes {MASTER_KEY_BYTES}` makes one"
        ) from error
