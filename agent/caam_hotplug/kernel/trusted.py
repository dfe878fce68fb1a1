"""The kernel's trusted keys, sealed by a trust source such as the CAAM, and keys under them.

The kernel unseals; user space never has the key, only blobs that are worthless elsewhere. Source:
trusted-encrypted.rst in the kernel's documentation; security/keys/trusted-keys/trusted_core.c and
security/keys/encrypted-keys/encrypted.c.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Final

from caam_hotplug.errors import (
    BlobRejectedError,
    DmError,
    HotplugError,
    KeyringError,
    MasterKeyError,
)
from caam_hotplug.formats.blobs import TRUSTED_KEY_BYTES, Encrypted, Trusted
from caam_hotplug.kernel import devmapper, keyring, memory
from caam_hotplug.kernel.keyring import KeySerial
from caam_hotplug.model import KeyType, SecretBytes

_NEW: Final = "caam-hotplug:new"
_DIGITS: Final = b"0123456789abcdef"
_NO_TRUSTED_KEYS: Final = (
    "the kernel has no trusted keys: it needs CONFIG_TRUSTED_KEYS, loaded, with a source such as "
    "CONFIG_TRUSTED_KEYS_CAAM, and the source's hardware"
)
_OPTIONS_WRONG: Final = (
    "its options are wrong, such as a key handle or a password; a TPM may also be locked, and the "
    "kernel's log has its error"
)
_NO_ENCRYPTED_KEYS: Final = "the kernel has no encrypted keys: it needs CONFIG_ENCRYPTED_KEYS"


def load_trusted(description: str, blob: Trusted, options: str = "") -> None:
    """Load the blob's key into the session keyring, as one of type `trusted`.

    `options` go to the trust source, such as `keyhandle=0x81000001` to a TPM. Raises:
    BlobRejectedError if the source does not unseal the blob; KeyringError for anything else.
    """
    keyring.unlink_key(description)  # to add one of the same description is to update it: EPERM
    _load_trusted(description, blob, options, keyring.KEY_SPEC_SESSION_KEYRING)


def load_encrypted(description: str, blob: Encrypted, master: Trusted, options: str = "") -> None:
    """Load the blob's key into the session keyring, as one of type `encrypted`.

    Its master is meanwhile in a keyring of this thread alone: others may use masters of the same
    description. Raises: MasterKeyError if the trust source does not unseal
    the master; BlobRejectedError if the blob is not of this master; KeyringError.
    """
    keyring.unlink_key(description)
    with _loaded_master(blob.master, master, options):
        try:
            keyring.add_key("encrypted", description, b"load " + blob.content)
        except KeyringError as error:
            raise _refusal_of_encrypted(error, blob) from error


def is_offered(kind: KeyType = "trusted") -> bool:
    """Return whether the kernel has keys of this type, which it loads if they are modules.

    Nothing loads a module for add_key(2), and dm-crypt's module needs those of the key types that
    it was built for. Worker: dm.
    """
    if not _has(kind):
        with suppress(DmError):
            devmapper.target_version("crypt")
    return _has(kind)


def _has(kind: KeyType) -> bool:
    try:
        keyring.add_key(kind, _NEW, b"?", keyring.KEY_SPEC_THREAD_KEYRING)
    except KeyringError as error:
        return error.errno == errno.EINVAL  # of the request, which a key type has read
    return True


def seal_trusted(length: int, options: str = "") -> bytes:
    """Seal a new key of so many bytes, which only the kernel has; return the blob in hex.

    Raises: KeyringError, EINVAL or EPERM if the trust source needs other options. Source:
    keyctl_read(3).
    """
    request = f"new {length} {options}".rstrip().encode()
    refusal = partial(_no_new_trusted, length=length, options=options)
    with _in_own_keyring("trusted", request, refusal) as serial:
        return keyring.read(serial, _NEW)


def seal_encrypted(key: int | SecretBytes, master: Trusted, name: str, options: str = "") -> bytes:
    """Encrypt a new key of so many bytes, or the given one, under the master; return the blob.

    `options` are the master's. The blob is a text that names the master. Raises: MasterKeyError;
    KeyringError.
    """
    length = key if isinstance(key, int) else len(key)
    head = f"new default trusted:{name} {length}".encode()
    with _loaded_master(name, master, options):
        if isinstance(key, int):
            with _in_own_keyring("encrypted", head, _no_new_encrypted) as serial:
                return keyring.read(serial, _NEW)
        with memory.locked(len(head) + 1 + 2 * length) as request:
            request.buffer[: len(head) + 1] = head + b" "
            for at in range(length):  # a library's function would leave a copy
                place = len(head) + 1 + 2 * at
                request.buffer[place] = _DIGITS[key.buffer[at] >> 4]
                request.buffer[place + 1] = _DIGITS[key.buffer[at] & 15]
            with _in_own_keyring("encrypted", request, _no_given_encrypted) as serial:
                return keyring.read(serial, _NEW)


@contextmanager
def _loaded_master(name: str, master: Trusted, options: str = "") -> Iterator[None]:
    """Load the master into this thread's own keyring for the block.

    Raises: MasterKeyError; KeyringError.
    """
    own = keyring.KEY_SPEC_THREAD_KEYRING
    try:
        serial = _load_trusted(name, master, options, own)
    except BlobRejectedError as error:
        raise MasterKeyError(f"the master key {name} cannot be used: {error}") from error
    try:
        yield
    finally:
        keyring.unlink(serial, name, own)


@contextmanager
def _in_own_keyring(
    kind: KeyType, request: bytes | SecretBytes, refusal: Callable[[int], str | None]
) -> Iterator[KeySerial]:
    """Add a new key to this thread's own keyring for the block. Raises: KeyringError."""
    own = keyring.KEY_SPEC_THREAD_KEYRING
    try:
        serial = keyring.add_key(kind, _NEW, request, own)
    except KeyringError as error:
        detail = refusal(error.errno or 0)
        if detail is None:
            raise
        raise KeyringError(f"make {kind} key", _NEW, error.errno or 0, detail) from error
    try:
        yield serial
    finally:
        keyring.unlink(serial, _NEW, own)


def _no_new_trusted(number: int, *, length: int, options: str) -> str | None:
    """Explain the error without the options: one may be a password."""
    match number:
        case errno.ENODEV:
            return _NO_TRUSTED_KEYS
        case errno.EINVAL if length not in TRUSTED_KEY_BYTES:
            return f"a trusted key has {TRUSTED_KEY_BYTES[0]} to {TRUSTED_KEY_BYTES[-1]} bytes"
        case errno.EINVAL if options:
            return "the trust source knows no such options, or needs others beside them"
        case errno.EINVAL:
            return (
                "a TPM needs options, such as keyhandle=0x81000001; of the CAAM a job has failed, "
                "and the kernel's log has its error"
            )
        case errno.EPERM:
            return f"the trust source refused: {_OPTIONS_WRONG}"
    return None


def _no_new_encrypted(number: int) -> str | None:
    match number:
        case errno.ENODEV:
            return _NO_ENCRYPTED_KEYS
        case errno.EINVAL:
            return "an encrypted key has 20 to 4096 bytes"
    return None


def _no_given_encrypted(number: int) -> str | None:
    if number == errno.EINVAL:
        return (
            "the kernel encrypts given keys only with CONFIG_USER_DECRYPTED_DATA, from Linux 6.0 on"
        )
    return _no_new_encrypted(number)


def _load_trusted(description: str, blob: Trusted, options: str, keyring_id: int) -> KeySerial:
    request = f"load {blob.content.hex()} {options}".rstrip().encode()
    try:
        return keyring.add_key("trusted", description, request, keyring_id)
    except KeyringError as error:
        raise _refusal_of_trusted(error) from error


def _refusal_of_trusted(error: KeyringError) -> HotplugError:
    match error.errno:
        case errno.EBADMSG:
            return BlobRejectedError(
                "the trust source refused the blob: damaged, sealed on another chip, "
                "or sealed in another security state of this one"
            )
        case errno.EPERM:  # a TPM's for every refusal
            return BlobRejectedError(
                "the trust source refused the blob: damaged, sealed by another chip, or "
                f"{_OPTIONS_WRONG}"
            )
        case errno.EINVAL | errno.E2BIG:
            return BlobRejectedError(
                "the trust source refused the blob: it has no valid form, or needs other options"
            )
        case errno.ENODEV:
            return KeyringError("add key", error.subject, errno.ENODEV, _NO_TRUSTED_KEYS)
    return error


def _refusal_of_encrypted(error: KeyringError, blob: Encrypted) -> HotplugError:
    match error.errno:
        case errno.EINVAL:
            return BlobRejectedError(
                f"the kernel refused the blob: damaged, or encrypted under another master key than "
                f"this board's {blob.master}"
            )
        case errno.ENODEV | errno.EOPNOTSUPP:
            return KeyringError("add key", error.subject, error.errno, _NO_ENCRYPTED_KEYS)
    return error
