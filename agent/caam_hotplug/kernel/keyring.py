"""Keys for dm-crypt in the agent's own session keyring, through libkeyutils.

Credentials and keyrings belong to threads, and a new thread has its parent's session keyring
(session-keyring(7)): `join_session_keyring` must run before any other thread exists.
"""

from __future__ import annotations

import errno
from ctypes import c_char, c_char_p, c_int32, c_long, c_size_t, c_void_p, create_string_buffer
from typing import Final, NewType, get_args

from caam_hotplug.errors import KeyringError
from caam_hotplug.kernel.ctypes_lib import Function, Library, minus_one, reported_as
from caam_hotplug.model import KeyType, SecretBytes

KeySerial = NewType("KeySerial", int)

_READ_MAX_BYTES: Final = 16 << 10
KEY_TYPES: Final = get_args(KeyType)
KEY_SPEC_THREAD_KEYRING: Final = -1
KEY_SPEC_SESSION_KEYRING: Final = -3


class Keyutils(Library, soname="libkeyutils.so.1", package="libkeyutils1"):
    """Source: keyutils.h."""

    add_key = Function(
        c_int32, c_char_p, c_char_p, c_void_p, c_size_t, c_int32, failure=minus_one
    )  # fmt: skip
    keyctl_join_session_keyring = Function(c_int32, c_char_p, failure=minus_one)
    keyctl_read = Function(c_long, c_int32, c_char_p, c_size_t, failure=minus_one)
    keyctl_search = Function(c_long, c_int32, c_char_p, c_char_p, c_int32, failure=minus_one)
    keyctl_unlink = Function(c_long, c_int32, c_int32, failure=minus_one)


def join_session_keyring() -> None:
    """Give this thread, and every one that it starts later, a new, empty session keyring.

    Raises: KeyringError. Source: keyctl_join_session_keyring(3).
    """
    with reported_as("join", "a session keyring", KeyringError):
        Keyutils.keyctl_join_session_keyring(None)


def add_key(
    kind: KeyType,
    description: str,
    payload: SecretBytes | bytes,
    keyring: int = KEY_SPEC_SESSION_KEYRING,
) -> KeySerial:
    """Add the key to the keyring. A logon key of the same description is replaced.

    User space cannot read a logon key back; of the other types it reads the sealed blob. Raises:
    KeyringError. Source: add_key(2), keyrings(7).
    """
    # No name ever stands for the bytes themselves, so that no traceback can show them.
    given = (c_char * len(payload)).from_buffer(
        payload.buffer if isinstance(payload, SecretBytes) else bytearray(payload)
    )
    with reported_as("add key", description, _not_added):
        serial = Keyutils.add_key(
            kind.encode(), description.encode(), given, len(payload), keyring
        )  # fmt: skip
    return KeySerial(serial)


def _not_added(operation: str, description: str, number: int) -> KeyringError:
    hint = "the user's key quota is used up" if number == errno.EDQUOT else ""
    return KeyringError(operation, description, number, hint)


def find_key(kind: KeyType, description: str) -> KeySerial | None:
    """Return the key's serial number, or None if the session keyring has no such key.

    Raises: KeyringError. Source: keyctl_search(3).
    """
    with reported_as("search for key", description, KeyringError):
        try:
            found = Keyutils.keyctl_search(
                KEY_SPEC_SESSION_KEYRING, kind.encode(), description.encode(), 0
            )
        except OSError as error:
            if error.errno in {errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED}:
                return None
            raise
    return KeySerial(found)


def read(serial: KeySerial, description: str) -> bytes:
    """Read the key's content; of the sealed types that is the blob, as keyctl pipe shows it.

    Raises: KeyringError. Source: keyctl_read(3).
    """
    content = create_string_buffer(_READ_MAX_BYTES)
    with reported_as("read key", description, KeyringError):
        length = Keyutils.keyctl_read(serial, content, len(content))
    return content.raw[:length]


def unlink_key(description: str) -> None:
    """Unlink the keys of that description from the session keyring, of every type for dm-crypt.

    Having had none is no error. The kernel frees the payload once nothing refers to the key.
    Raises: KeyringError. Source: keyctl_unlink(3).
    """
    for kind in KEY_TYPES:
        serial = find_key(kind, description)
        if serial is not None:
            unlink(serial, description, KEY_SPEC_SESSION_KEYRING)


def unlink(serial: KeySerial, description: str, keyring: int) -> None:
    """Unlink the key from the keyring, if it is there. Raises: KeyringError.

    Source: keyctl_unlink(3).
    """
    with reported_as("unlink key", description, KeyringError):
        try:
            Keyutils.keyctl_unlink(serial, keyring)
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.ENOKEY}:
                raise
