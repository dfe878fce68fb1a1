from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.kernel import udev


def encoded(text: str) -> str:
    """As libblkid encodes a label: plain characters stay, other bytes become `\\xNN`."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#+-.:=@_"
    return "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in text.encode())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_libblkid_encodes_comes_back_as_it_was(text: str) -> None:
    assert udev.decoded(encoded(text)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cartridge", "cartridge"),
        ("my\\x20data", "my data"),
        ("a\\x2f..\\x2Fb", "a/../b"),
        ("\\xc3\\xbcber", "über"),
        ("über", "über"),
        ("\\x5cx2f", "\\x2f"),  # a backslash that is the label's own is decoded once
        ("Ultra\\x20\\x20\\x20", "Ultra   "),
        ("a\\x0ab\\x00", "a\nb\0"),
        ("", ""),
    ],
)
def test_a_value_is_decoded(value: str, text: str) -> None:
    assert udev.decoded(value) == text


@pytest.mark.parametrize("value", ["\\", "\\x", "\\x2", "\\xg0", "\\n", "\\\\y20", "x2f"])
def test_what_is_no_escape_stays(value: str) -> None:
    assert udev.decoded(value) == value


@pytest.mark.parametrize("value", ["a\\xff", "a\\xc3", "a\udcff"])
def test_bytes_that_are_no_utf8_become_the_replacement_character(value: str) -> None:
    assert udev.decoded(value) == "a\ufffd"


def test_no_volume_sits_at_a_name_that_the_kernel_does_not_know() -> None:
    assert udev.present_id("no-such-device") is None
