"""The few things that the relay reads of a message."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bus import flood
from caam_hotplug.dbus import wire
from caam_hotplug.dbus.wire import MalformedError

PING = flood.call(*flood.CALLS["ping"])
GET = flood.call(*flood.CALLS["get"])
LOCK = flood.call("org.caamhotplug1.Volume", "Lock", ())
LINE = b"AGREE_UNIX_FD\r\n"
KINDS = ["ping", "get", "lock", "line"]
NO_REPLY = 1


def as_signal(message: bytes) -> bytes:
    return message[:1] + b"\4" + message[2:]


def with_field(message: bytes, field: bytes) -> bytes:
    """Return a message without a body with another field in its header."""
    (size,) = struct.unpack_from("<I", message, 12)
    fields = flood.aligned(message[16 : 16 + size], 8) + field
    return flood.aligned(message[:12] + struct.pack("<I", len(fields)) + fields, 8)


@pytest.mark.parametrize("message", [PING, GET, LOCK, LINE], ids=KINDS)
def test_the_end_of_a_message_is_known_once_its_head_is_there(message: bytes) -> None:
    for cut in range(len(message)):
        assert wire.length(message[:cut]) in {None, len(message)}
    assert wire.length(message + PING) == len(message)


def test_numbers_are_read_in_the_order_of_the_sender() -> None:
    assert wire.length(b"B\1\0\1" + struct.pack(">III", 5, 1, 9)) == 16 + 16 + 5


def test_a_line_without_an_end_is_malformed() -> None:
    assert wire.length(b"x" * 1000) is None
    with pytest.raises(MalformedError):
        wire.length(b"x" * (64 << 10))


@pytest.mark.parametrize("message", [PING, GET, LOCK, LINE], ids=KINDS)
def test_requests_are_of_use(message: bytes) -> None:
    assert wire.is_of_use(message, to_agent=True)
    assert wire.is_of_use(message, to_agent=False)


def test_a_question_to_which_no_reply_is_wanted_is_of_no_use_to_an_agent() -> None:
    question = flood.call(*flood.CALLS["get"], flags=NO_REPLY)
    assert not wire.is_of_use(question, to_agent=True)
    assert wire.is_of_use(question, to_agent=False)


def test_a_request_to_which_no_reply_is_wanted_is_of_use() -> None:
    request = flood.call("org.caamhotplug1.Volume", "Lock", (), flags=NO_REPLY)
    assert wire.is_of_use(request, to_agent=True)


def test_a_signal_is_of_use_to_a_client_only() -> None:
    assert not wire.is_of_use(as_signal(LOCK), to_agent=True)
    assert wire.is_of_use(as_signal(LOCK), to_agent=False)


@pytest.mark.parametrize(
    "field",
    [b"\x09\1u\0" + struct.pack("<I", 1), b"\x0a\2ai\0", b"\x0a\1v\0\1u\0"],
    ids=["descriptors", "array", "variant"],
)
def test_descriptors_and_unknown_fields_are_of_no_use(field: bytes) -> None:
    assert not wire.is_of_use(with_field(PING, field), to_agent=False)


@given(st.binary(max_size=200), st.sampled_from([b"", b"l", b"B", PING[:16], PING[:40]]))
def test_any_bytes_have_an_answer(rest: bytes, begin: bytes) -> None:
    with suppress(MalformedError):
        length = wire.length(begin + rest)
        if length is not None and length <= len(begin + rest):
            assert length > 0
            wire.is_of_use((begin + rest)[:length], to_agent=True)
