"""Logon keys in the agent's own session keyring, through libkeyutils.

Credentials and keyrings belong to threads, and a thread inherits the session keyring of the one
that made it (session-keyring(7)): `join_session_keyring` must run before any other thread exists.
"""

from __future__ import annotations

import ctypes
import errno
from typing import Final

from caam_hotplug.errors import KeyringError
from caam_hotplug.kernel import cbind
from caam_hotplug.model import KeySerial, SecretBytes

_LIBKEYUTILS: Final = "libkeyutils.so.1"
_LOGON: Final = b"logon"
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


def add_logon_key(description: str, payload: SecretBytes) -> KeySerial:
    """The key is in the session keyring; one of the same description is replaced.

    User space cannot read a logon key back. Raises: KeyringError. Source: add_key(2).
    """
    pointers = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32)
    add_key = _declare("add_key", pointers)
    buffer = (ctypes.c_char * len(payload)).from_buffer(payload.buffer)
    try:
        serial = add_key(
            _LOGON, description.encode(), buffer, len(payload), KEY_SPEC_SESSION_KEYRING
        )
    except OSError as error:
        hint = "the user's key quota is used up" if error.errno == errno.EDQUOT else ""
        raise KeyringError("add key", description, error.errno or 0, hint) from error
    return KeySerial(serial)


def find_logon_key(description: str) -> KeySerial | None:
    """The key's serial number, or None if the session keyring has none of that description.

    Raises: KeyringError. Source: keyctl_search(3).
    """
    search = _declare(
        "keyctl_search", (ctypes.c_int32, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int32)
    )
    try:
        return KeySerial(search(KEY_SPEC_SESSION_KEYRING, _LOGON, description.encode(), 0))
    except OSError as error:
        if error.errno in {errno.ENOKEY, errno.EKEYREVOKED, errno.EKEYEXPIRED}:
            return None
        raise KeyringError("search for key", description, error.errno or 0) from error


def unlink_logon_key(description: str) -> None:
    """The session keyring has no key of that description; having had none is no error.

    The kernel frees the payload once nothing refers to the key. Raises: KeyringError.
    Source: keyctl_unlink(3).
    """
    serial = find_logon_key(description)
    if serial is None:
        return
    unlink = _declare("keyctl_unlink", (ctypes.c_int32, ctypes.c_int32))
    try:
        unlink(serial, KEY_SPEC_SESSION_KEYRING)
    except OSError as error:
        if error.errno not in {errno.ENOENT, errno.ENOKEY}:
            raise KeyringError("unlink key", description, error.errno or 0) from error


def _declare(name: str, arguments: tuple[object, ...]) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = cbind.declare(
        _LIBKEYUTILS, name, ctypes.c_long, arguments, cbind.minus_one_is_failure
    )
    return function
