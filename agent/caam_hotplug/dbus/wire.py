"""Where a message on the bus ends, and whether it is of use. Nothing else is parsed here.

Source: the D-Bus Specification, "Message Format" and "Authentication Protocol".
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Final

_LINE_END: Final = b"\r\n"
_LONGEST_LINE: Final = 16 << 10
_FIXED_BYTES: Final = 16
_FIELDS_AT: Final = 12
_BODY_LENGTH_AT: Final = 4
_ORDERS: Final = {ord("l"): "<I", ord("B"): ">I"}
"""How a message's numbers are read, by its first byte. No line of the authentication has those."""
_CALL: Final = 1
_REPLIES: Final = (2, 3)
_SIGNAL: Final = 4
_NO_REPLY: Final = 0x1
_INTERFACE: Final = 2
_UNIX_FDS: Final = 9
"""Codes of header fields. The second says how many file descriptors come with the message."""
_OF_THE_BUS: Final = b"org.freedesktop.DBus"
"""Begin of the interfaces that only read: properties, introspection and the like."""
_TEXTS: Final = b"os"
_SIGNATURE: Final = ord("g")
_NUMBER: Final = ord("u")


class MalformedError(Exception):
    """What has come is not of D-Bus."""


def length(came: bytes | bytearray) -> int | None:
    """Return the bytes of the first message, or line of the authentication; None if not yet known.

    Raises: MalformedError.
    """
    if not came:
        return None
    order = _ORDERS.get(came[0])
    if order is None:
        end = came.find(_LINE_END, 0, _LONGEST_LINE)
        if end < 0 and len(came) >= _LONGEST_LINE:
            raise MalformedError("a line without an end")
        return None if end < 0 else end + len(_LINE_END)
    if len(came) < _FIXED_BYTES:
        return None
    (body,) = struct.unpack_from(order, came, _BODY_LENGTH_AT)
    (fields,) = struct.unpack_from(order, came, _FIELDS_AT)
    return _FIXED_BYTES + int(_aligned(fields, 8) + body)


def is_of_use(message: bytes, *, to_agent: bool) -> bool:
    """Return whether to handle a whole message, or line of the authentication.

    No file descriptor is of use. `to_agent`: neither is a signal, nor a question of the bus's own
    interfaces to which no reply is wanted.
    """
    order = _ORDERS.get(message[0])
    if order is None:
        return True
    is_signal = message[1] == _SIGNAL
    is_unanswered = message[1] == _CALL and bool(message[2] & _NO_REPLY)
    try:
        fields = dict(_fields(message, order))
    except (IndexError, ValueError, struct.error):
        return False
    is_question = fields.get(_INTERFACE, _OF_THE_BUS).startswith(_OF_THE_BUS)
    is_for_nobody = is_signal or (is_unanswered and is_question)
    return _UNIX_FDS not in fields and not (to_agent and is_for_nobody)


def is_awaited(message: bytes) -> bool:
    """Return whether it continues what this side has begun: as a reply, or the authentication."""
    return bool(message) and (message[0] not in _ORDERS or message[1] in _REPLIES)


def _fields(message: bytes, order: str) -> Iterator[tuple[int, bytes]]:
    """Yield codes of the header's fields, and the values of those that are texts.

    All fields that the specification has are texts, a signature or a number.

    Raises: ValueError for another one; IndexError, struct.error for a header cut short.
    """
    (size,) = struct.unpack_from(order, message, _FIELDS_AT)
    at, end = _FIXED_BYTES, _FIXED_BYTES + size
    while at < end:
        code, signature_bytes, kind = message[at], message[at + 1], message[at + 2]
        if signature_bytes != 1:
            raise ValueError(code)
        value, at = b"", at + 4  # with the zero that ends the signature
        if kind in _TEXTS:
            (text,) = struct.unpack_from(order, message, at)  # aligned, as the field is to 8
            value = message[at + 4 : at + 4 + text]
            at += 4 + text + 1
        elif kind == _SIGNATURE:
            at += 1 + message[at] + 1
        elif kind == _NUMBER:
            at += 4
        else:
            raise ValueError(code)
        yield code, value
        at = _aligned(at, 8)


def _aligned(position: int, to: int) -> int:
    return position + -position % to
