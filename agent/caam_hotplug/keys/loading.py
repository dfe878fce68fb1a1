"""Load blobs as keys into the kernel's keyring: a class for each backend."""

from __future__ import annotations

from typing import Any, Final, Protocol

from caam_hotplug.config.rules import KeySource
from caam_hotplug.errors import BlobError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.model import KeyReference


class Backend(Protocol):
    """Brings keys of one type into the agent's session keyring."""

    def load(self, kernel: Kernel, blob: Any, source: KeySource, description: str) -> KeyReference:
        """Load the blob's key into the keyring. Raises: BlobRejectedError; HotplugError."""
        ...


class TaggedKeys:
    """NXP's kernels: the CAAM makes a black key of the blob, which only its ciphers can use."""

    def load(
        self, kernel: Kernel, blob: blobs.Tagged, source: KeySource, description: str
    ) -> KeyReference:
        with kernel.import_blob(blob.content) as key:
            kernel.add_key(description, key)
            return KeyReference("logon", len(key))


class TrustedKeys:
    """Mainline kernels: the trust source unseals the blob for the kernel itself."""

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


class EncryptedKeys:
    """Mainline kernels: one trusted master for the board, and under it a key for each medium."""

    def load(
        self, kernel: Kernel, blob: blobs.Encrypted, source: KeySource, description: str
    ) -> KeyReference:
        kernel.load_encrypted_key(description, blob, source.options)
        return KeyReference("encrypted", blob.key_bytes)


BACKENDS: Final[dict[blobs.Backend, Backend]] = {
    "tagged": TaggedKeys(),
    "trusted": TrustedKeys(),
    "encrypted": EncryptedKeys(),
}


def load(kernel: Kernel, blob: blobs.Blob, source: KeySource, description: str) -> KeyReference:
    """Load the key by the backend that the blob's form asks for."""
    return BACKENDS[blobs.backend_of(blob)].load(kernel, blob, source, description)
