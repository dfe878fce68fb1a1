"""The crypt target line: built for a volume, parsed from the kernel, compared for adoption.

    START LENGTH crypt CIPHER :KEY_BYTES:KEY_TYPE:DESCRIPTION IV_OFFSET DEVICE OFFSET [N OPTION…]

Source: dm-crypt.rst in the kernel's documentation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.errors import UnsupportedVolumeError
from caam_hotplug.model import (
    SECTOR_BYTES,
    DeviceNumber,
    KeyReference,
    KeyType,
    Sectors,
    Volume,
    number,
)

CIPHERS: Final[dict[KeyType, str]] = {
    "logon": "capi:tk(cbc(aes))-plain",
    "trusted": "aes-xts-plain64",
    "encrypted": "aes-xts-plain64",
}
"""Meaning of `auto` in a rule, by the type of the key."""

_PLAIN_IV: Final = re.compile(r"-plain(be)?$")
_IV_WRAPS_AT: Final = 1 << 32


Flag = Literal[
    "allow_discards",
    "same_cpu_crypt",
    "submit_from_crypt_cpus",
    "no_read_workqueue",
    "no_write_workqueue",
    "iv_large_sectors",
]
"""Optional parameters of dm-crypt that a rule may ask for (dm-crypt.rst)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crypt:
    """How a volume is encrypted. Plain dm-crypt has no header, so a rule must say it."""

    cipher: str = "auto"
    """Cipher as dm-crypt spells it. `auto` is capi:tk(cbc(aes))-plain for a tagged key and
    aes-xts-plain64 for any other."""
    sector_size: Literal[512, 1024, 2048, 4096] = 512
    """Bytes that are encrypted as one."""
    offset: int = 0
    """Start of the ciphertext on the volume, in 512-byte sectors."""
    iv_offset: int = 0
    """Number that is added to a sector's number to make its IV, in 512-byte sectors."""
    flags: tuple[Flag, ...] = ()
    """Optional parameters of dm-crypt."""


@dataclass(frozen=True, slots=True)
class CryptTarget:
    """A dm-crypt target that covers a whole mapping."""

    length: Sectors
    cipher: str
    key_bytes: int
    key_description: str
    """`TYPE:DESCRIPTION`; the description may itself have colons."""
    iv_offset: int
    device: DeviceNumber
    offset: int
    options: frozenset[str]

    def to_line(self) -> str:
        """Spell the target as the line that a table load takes."""
        options = f" {len(self.options)} {' '.join(sorted(self.options))}" if self.options else ""
        return (
            f"0 {self.length} crypt {self.cipher} :{self.key_bytes}:{self.key_description} "
            f"{self.iv_offset} {self.device} {self.offset}{options}"
        )

    @classmethod
    def from_line(cls, line: str) -> CryptTarget | None:
        """Read a target line; None for any other target, or for a key that is in no keyring."""
        fields = line.split(" ")
        if len(fields) < 8 or fields[0] != "0" or fields[2] != "crypt":
            return None
        _, length, _, cipher, key, iv_offset, device, offset, *listed = fields
        empty, _, sized = key.partition(":")
        key_bytes, colon, description = sized.partition(":")
        # Only the kernel's own spelling is accepted: another table must not pass for ours.
        options = frozenset(listed[1:])
        is_counted = not listed or (options and listed[0] == str(len(listed) - 1))
        has_twins = len(options) < len(listed[1:])
        if empty or not colon or not is_counted or has_twins:
            return None
        try:
            return cls(
                length=Sectors(number(length)),
                cipher=cipher,
                key_bytes=number(key_bytes),
                key_description=description,
                iv_offset=number(iv_offset),
                device=DeviceNumber.from_text(device),
                offset=number(offset),
                options=options,
            )
        except ValueError:
            return None

    def does_the_same(self, other: CryptTarget) -> bool:
        """Whether both map the same bytes in the same way, with a key of any size."""
        return (
            self.length == other.length
            and self.cipher == other.cipher
            and self.key_description == other.key_description
            and self.iv_offset == other.iv_offset
            and self.device == other.device
            and self.offset == other.offset
            and self.options == other.options
        )


def cipher_for(crypt: Crypt, kind: KeyType) -> str:
    """Resolve `auto` for a key of this type."""
    return CIPHERS[kind] if crypt.cipher == "auto" else crypt.cipher


def crypt_target(volume: Volume, crypt: Crypt, key: KeyReference) -> CryptTarget:
    """Build the target for a volume under a rule, with a key under the volume's description.

    Raises: UnsupportedVolumeError if the ciphertext would not fit or its IV would repeat.
    """
    cipher = cipher_for(crypt, key.type)
    per_sector = crypt.sector_size // SECTOR_BYTES
    length = (volume.size - crypt.offset) // per_sector * per_sector
    if length <= 0:
        raise UnsupportedVolumeError(
            f"map {volume.name}: it has {volume.size} sectors, the rule's offset is {crypt.offset}"
        )
    unit = per_sector if "iv_large_sectors" in crypt.flags else 1
    if _PLAIN_IV.search(cipher) and (length + crypt.iv_offset) // unit > _IV_WRAPS_AT:
        raise UnsupportedVolumeError(
            f"map {volume.name}: {cipher} repeats its IV after 2^32 sectors and the volume "
            f"is larger; use plain64"
        )
    options: set[str] = set(crypt.flags)
    if crypt.sector_size != SECTOR_BYTES:  # the kernel leaves its default out when it lists
        options.add(f"sector_size:{crypt.sector_size}")
    return CryptTarget(
        length=Sectors(length),
        cipher=cipher,
        key_bytes=key.length,
        key_description=f"{key.type}:{names.key_description(volume.id)}",
        iv_offset=crypt.iv_offset,
        device=volume.number,
        offset=crypt.offset,
        options=frozenset(options),
    )
