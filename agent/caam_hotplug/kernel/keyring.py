"""Keys for dm-crypt in the agent's own session keyring, through libkeyutils.

Credentials and keyrings belong to threads, and a thread inherits the session keyring of the one
that made it (session-keyring(7)): `join_session_keyring` must run before any other thread exists.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Final, get_args

from caam_hotplug.errors import KeyringError
from caam_hotplug.kernel import ctypes_lib
from caam_hotplug.model import KeySerial, KeyType, SecretBytes

_LIBKEYUTILS: Final = "libkeyutils.so.1"
_READ_MAX_BYTES: Final = 16 << 10
KEY_TYPES: Final = get_args(KeyType)
KEY_SPEC_THREAD_KEYRING: Final = -1
KEY_SPEC_SESSION_KEYRING: Final = -3


def join_session_keyring() -> None:
    """This thread, and every one it makes from now on, has a new, empty session keyring.

    Raises: KeyringError. Source: keyctl_join_session_keyring(3).
    """
    join = _declare("keyctl_join_session_keyring", (ctypes.c_char_p,))
    try:
        join(None)
    except OSError as error:
        raise KeyringError("join", "a session keyring", error.errno or 0) from error


def add_key(
    kind: KeyType,
    description: str,
    payload: SecretBytes | bytes,
    keyring: int = KEY_SPEC_SESSION_KEYRING,
) -> KeySerial:
    """The key is in the keyring. A logon key of the same description is replaced.

    User space cannot read a logon key back; of the other types it reads the sealed blob. Raises:
    KeyringError. Source: add_key(2), keyrings(7).
    """
    pointers = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32)
    add_key = _declare("add_key", pointers)
    # No name ever stands for the bytes themselves, so that no traceback can show them.
    given = (ctypes.c_char * len(payload)).from_buffer(
        payload.buffer if isinstance(payload, SecretBytes) else bytearray(payload)
    )
    try:
        serial = add_key(kind.encode(), description.encode(), given, len(payload), keyring)
    except OSError as error:
        hint = "the user's key quota is used up" if error.errno == errno.EDQUOT else ""
        raise KeyringError("add key", description, error.errno or 0, hint) from error
    return KeySerial(serial)


def find_key(kind: KeyType, description: str) -> KeySerial | None:
    """The key's serial number, or None if the session keyring has none of that description.

    Raises: KeyringError. Source: keyctl_search(3).
    """
    search = _declare(
        "keyctl_search", (ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32)
    )
    try:
        found = search(KEY_SPEC_SESSION_KEYRING, kind.encode(), description.encode(), 0)
    except OSError as error:
        if error.errno in {errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED}:
            return None
        raise KeyringError("search for key", description, error.errno or 0) from error
    return KeySerial(found)


def read(serial: KeySerial, description: str) -> bytes:
    """What the kernel shows of the key; of the sealed types it is the blob, as keyctl pipe has it.

    Raises: KeyringError. Source: keyctl_read(3).
    """
    read_it = _declare("keyctl_read", (ctypes.c_int32, ctypes.c_char_p, ctypes.c_size_t))
    shown = ctypes.create_string_buffer(_READ_MAX_BYTES)
    try:
        length = read_it(serial, shown, len(shown))
    except OSError as error:
        raise KeyringError("read key", description, error.errno or 0) from error
    return shown.raw[:length]


def unlink_key(description: str) -> None:
    """The session keyring has no key of that description, of any type that dm-crypt takes.

    Having had none is no error. The kernel frees the payload once nothing refers to the key.
    Raises: KeyringError. Source: keyctl_unlink(3).
    """
    for kind in KEY_TYPES:
        serial = find_key(kind, description)
        if serial is not None:
            unlink(serial, description, KEY_SPEC_SESSION_KEYRING)


def unlink(serial: KeySerial, description: str, keyring: int) -> None:
    """The keyring does not have the key. Raises: KeyringError. Source: keyctl_unlink(3)."""
    unlink_it = _declare("keyctl_unlink", (ctypes.c_int32, ctypes.c_int32))
    try:
        unlink_it(serial, keyring)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOKEY}:
            raise KeyringError("unlink key", description, error.errno or 0) from error


def _declare(name: str, arguments: tuple[object, ...]) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = ctypes_lib.declare(
        _LIBKEYUTILS, name, ctypes.c_long, arguments, ctypes_lib.minus_one_is_failure
    )
    return function
