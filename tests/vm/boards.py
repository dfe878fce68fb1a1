"""Boards by their seal method: what their kernels have, how media are made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from vm import media
from vm.sealing import encrypted_blob, trusted_blob

MASTER: Final = b"the board's master key, which is 64 bytes long, as they often are"[:64]
MEDIUM: Final = b"a medium's own key of sixty-four bytes, two of AES-256 for XTS..."[:64]


@dataclass(frozen=True, slots=True)
class Board:
    """A board, with a blob for the label cartridge-01."""

    backend: Literal["tagged", "trusted", "encrypted"]
    key: bytes
    cipher: media.Cipher
    target: str
    """Part of its media's crypt target between length and offset, without the description."""
    procedure: str
    """Shell commands for a medium on /dev/sda1, mapped as `card`, with blob cartridge-07.bb."""
    refusal: str
    """Message of another board about its blobs."""
    call: str
    """System call that waits for the CAAM."""

    @property
    def medium(self) -> dict[str, Any]:
        """Arguments of `media.make_medium` for its media."""
        return {"key": self.key, "cipher": self.cipher}

    def blobs(self, otpmk: str = media.OTPMK_A) -> dict[str, bytes]:
        """Return the blobs that only this host can make, by their file names."""
        match self.backend:
            case "tagged":
                return {}
            case "trusted":
                return {"cartridge-01.bb": trusted_blob(self.key, otpmk)}
        return {
            "cartridge-01.bb": encrypted_blob(self.key, MASTER, "master"),
            "master.bb": trusted_blob(MASTER, otpmk),
        }


TAGGED: Final = Board(
    "tagged",
    media.KEY,
    "cbc-plain",
    "capi:tk(cbc(aes))-plain :36:logon:",
    """
    caam-keygen create randomkey ecb -s 16
    cat /data/caam/randomkey | keyctl padd logon logkey: @s
    dmsetup create card --table "0 $(blockdev --getsz /dev/sda1) \
    crypt capi:tk(cbc(aes))-plain :36:logon:logkey: 0 /dev/sda1 0 1 sector_size:512"
    rm /data/caam/randomkey
    mv /data/caam/randomkey.bb /data/caam/cartridge-07.bb
    """,
    "the CAAM refused the blob: damaged, sealed on another chip",
    "ioctl",
)
TRUSTED: Final = Board(
    "trusted",
    MEDIUM,
    "xts-plain64",
    "aes-xts-plain64 :64:trusted:",
    """
    modprobe dm-crypt
    keyctl add trusted card "new 64" @s
    keyctl pipe $(keyctl search @s trusted card) > /data/caam/cartridge-07.bb
    dmsetup create card --table "0 $(blockdev --getsz /dev/sda1) \
    crypt aes-xts-plain64 :64:trusted:card 0 /dev/sda1 0"
    """,
    "the trust source refused the blob: damaged, sealed on another chip",
    "add_key",
)
ENCRYPTED: Final = Board(
    "encrypted",
    MEDIUM,
    "xts-plain64",
    "aes-xts-plain64 :64:encrypted:",
    """
    modprobe dm-crypt
    keyctl add trusted master "load $(cat /data/caam/master.bb)" @s
    keyctl add encrypted card "new default trusted:master 64" @s
    keyctl pipe $(keyctl search @s encrypted card) > /data/caam/cartridge-07.bb
    dmsetup create card --table "0 $(blockdev --getsz /dev/sda1) \
    crypt aes-xts-plain64 :64:encrypted:card 0 /dev/sda1 0"
    """,
    "the master key master cannot be used: the trust source refused the blob",
    "add_key",
)
BOARDS: Final = (TAGGED, TRUSTED, ENCRYPTED)
