"""A recovery file: a medium's key, and the command that opens the medium with it on any Linux PC.

It is text: comments with `#`, then lines `name = value`. The key is in base64, which is encoded and
decoded here byte by byte. Every ready-made function would leave copies that are not overwritten.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.formats.crypt_table import CIPHERS, Crypt
from caam_hotplug.model import KeyType, SecretBytes

MAX_BYTES: Final = 16 << 10
"""Of a recovery file. Those that this program writes have a tenth."""
KEY_MAX_BYTES: Final = 64
_KEY_BYTES: Final = (16, 32, 64)
_ALPHABET: Final = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
_KEY_LINE: Final = b"key = "
_TAGGED: Final = re.compile(r"capi:tk\((?P<mode>[a-z0-9]+)\((?P<cipher>[a-z0-9]+)\)\)-(?P<iv>.+)")
_FIELD: Final = re.compile(r"(?P<name>[a-z-]+) = (?P<value>[!-~]+)")

_TEXT: Final = """\
# Recovery key of the medium {label}. Everybody who reads this file can read the medium:
# keep it apart from the medium and from the board.
#
# On any Linux PC, as root, in the folder of this file, with the medium plugged in:
#
#   {command}
#   mount /dev/mapper/{label} /mnt
#
# and when done:
#
#   umount /mnt
#   cryptsetup close {label}
#
# On another board with a CAAM:
#
#   caam-hotplug key enroll {label} --from {file}
#
label = {label}
cipher = {cipher}
sector-size = {sector_size}
filesystem = {filesystem}
id = {id}
"""


class RecoveryFileError(HotplugError):
    """A file that is no recovery file, or not one for this."""


@dataclass(frozen=True, slots=True)
class About:
    """The description of the medium in a recovery file."""

    label: str
    cipher: str
    """As in a rule."""
    sector_size: int
    filesystem: str
    id: str
    """The file's random identifier. It is part of the mark of a medium that is not finished."""


def plain_cipher(cipher: str) -> str | None:
    """Return cryptsetup's name of a rule's cipher, or None if it has none."""
    found = _TAGGED.fullmatch(cipher)
    if found is not None:
        return f"{found['cipher']}-{found['mode']}-{found['iv']}"
    return None if cipher.startswith("capi:") else cipher


def command(about: About, file: str, key_bytes: int) -> str:
    """Return the command that opens the medium on a PC, from the recovery file's folder."""
    return (
        f"sed -n 's/^key = //p' {shlex.quote(file)} | base64 -d | cryptsetup open --type plain "
        f"--cipher {plain_cipher(about.cipher)} --key-size {key_bytes * 8} --hash plain "
        f"--sector-size {about.sector_size} --key-file - "
        f"/dev/disk/by-partlabel/{about.label} {about.label}"
    )


def head(about: About, file: str, key_bytes: int) -> bytes:
    """Return the file's text without its last line, the key. None of it is secret."""
    text = _TEXT.format(
        label=about.label,
        cipher=about.cipher,
        sector_size=about.sector_size,
        filesystem=about.filesystem,
        id=about.id,
        command=command(about, file, key_bytes),
        file=shlex.quote(file),
    )
    return text.encode()


def key_line_length(key_bytes: int) -> int:
    """Return the length of the last line with its end."""
    return len(_KEY_LINE) + (key_bytes + 2) // 3 * 4 + 1


def write_key_line(key: SecretBytes, into: bytearray, at: int) -> None:
    """Write the last line into the buffer, from that position on."""
    for code in (*_KEY_LINE, *_encoded(key.buffer), ord("\n")):
        into[at] = code
        at += 1


def read_about(content: bytearray) -> About:
    """Read the description. Raises: RecoveryFileError."""
    fields: dict[str, str] = {}
    for start, end in _lines(content):
        if content[start] in b"#\n" or content.startswith(_KEY_LINE, start):
            continue
        line = content[start:end].removesuffix(b"\r").decode(errors="replace")
        found = _FIELD.fullmatch(line)
        if found is None:
            raise RecoveryFileError("it has a line that is no `name = value`")
        fields[found["name"]] = found["value"]
    try:
        about = About(
            label=fields["label"],
            cipher=fields["cipher"],
            sector_size=int(fields["sector-size"]),
            filesystem=fields["filesystem"],
            id=fields["id"],
        )
    except (KeyError, ValueError) as error:
        missing = "it lacks label, cipher, sector-size, filesystem or id"
        raise RecoveryFileError(f"it is no recovery file: {missing}") from error
    reason = names.why_unsafe(about.label)
    if reason is not None:
        raise RecoveryFileError(f"its label cannot be one: {reason}")
    return about


def read_key(content: bytearray, into: SecretBytes) -> int:
    """Decode the key into the start of `into`. Returns: its length. Raises: RecoveryFileError."""
    at = content.find(b"\n" + _KEY_LINE)
    if at < 0:
        raise RecoveryFileError("it is no recovery file: it has no key")
    length, bits, held = 0, 0, 0
    for place in range(at + 1 + len(_KEY_LINE), len(content)):  # a slice would be a copy
        code = content[place]
        if code in b"=\r\n":
            break
        value = _ALPHABET.find(code)
        if value < 0 or length == len(into):
            raise RecoveryFileError("its key is damaged: it is not base64 of 16, 32 or 64 bytes")
        held, bits = (held << 6 | value) & 0xFFFF, bits + 6
        if bits >= 8:
            bits -= 8
            into.buffer[length] = held >> bits & 0xFF
            length += 1
    if length not in _KEY_BYTES:
        raise RecoveryFileError(f"its key is damaged: it has {length} bytes, not 16, 32 or 64")
    if into.buffer.find(0, 0, length) >= 0:  # a slice would be a copy that is not overwritten
        raise RecoveryFileError("its key has a zero byte, which no CAAM takes")
    return length


def _lines(content: bytearray) -> Iterator[tuple[int, int]]:
    start = 0
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        yield start, end
        start = end + 1


def _encoded(key: bytearray) -> Iterator[int]:
    for at in range(0, len(key), 3):
        group = 0
        for place in range(3):
            group = group << 8 | (key[at + place] if at + place < len(key) else 0)
        there = min(3, len(key) - at) + 1
        for place in range(4):
            yield _ALPHABET[group >> (18 - 6 * place) & 63] if place < there else ord("=")


def needs_rule(about: About, kind: KeyType) -> Iterator[str]:
    """Yield a note if a board needs a rule of its own to open the medium with such a key."""
    cipher = about.cipher if kind == "logon" else plain_cipher(about.cipher)
    if (cipher, about.sector_size) != (CIPHERS[kind], Crypt().sector_size):
        yield (
            f"note: its rule on this board must say cipher = {cipher!r} and "
            f"sector_size = {about.sector_size}"
        )
