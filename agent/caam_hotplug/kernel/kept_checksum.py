"""Bytes that are chosen so that a content keeps the CRC-32 that it had."""

from __future__ import annotations

import binascii
import struct
from typing import Final

CHOSEN_BYTES: Final = 4
_TRIES: Final = 0x100
_SURROGATES: Final = range(0xD800, 0xE000)


def keep(content: bytearray, at: int, crc: int) -> None:
    """Choose the four bytes at the place so that the content has this CRC-32.

    Half of a surrogate pair is none of them, which would not be text for programs that read beyond
    the end of a name, as libparted does. For that, the two bytes before the place are tried.
    """
    for filler in range(_TRIES):
        content[at - 2 : at] = filler.to_bytes(2, "little")
        _choose(content, at, crc)
        chosen_units = struct.unpack_from("<HH", content, at)
        if not any(unit in _SURROGATES for unit in chosen_units):
            return


def _choose(content: bytearray, at: int, crc: int) -> None:
    """Choose the four bytes at the place.

    A bit changes the CRC by a constant that depends on the bit's place alone. So the bits whose
    constants together are the difference are found as equations are solved, by elimination.
    """
    content[at : at + CHOSEN_BYTES] = bytes(CHOSEN_BYTES)
    plain = binascii.crc32(content)
    basis: dict[int, tuple[int, int]] = {}
    for bit in range(8 * CHOSEN_BYTES):
        content[at : at + CHOSEN_BYTES] = (1 << bit).to_bytes(CHOSEN_BYTES, "little")
        rest, bits = _reduced(binascii.crc32(content) ^ plain, 1 << bit, basis)
        basis[rest.bit_length()] = (rest, bits)
    _, bits = _reduced(plain ^ crc, 0, basis)
    content[at : at + CHOSEN_BYTES] = bits.to_bytes(CHOSEN_BYTES, "little")


def _reduced(rest: int, bits: int, basis: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return what is left of a difference without the constants of the basis, and the bits."""
    while rest and rest.bit_length() in basis:
        constant, of_bits = basis[rest.bit_length()]
        rest, bits = rest ^ constant, bits ^ of_bits
    return rest, bits
