"""What a medium holds at a place or two, and what its mapping makes of it, as digests.

It is read before and after a sleep. Only digests are kept, so that no plaintext outlives the
comparison: Python's own hash of bytes, which has another secret key in every process
(`object.__hash__` in Python's reference).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.kernel import sysfs, sysfs_tree
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.model import SECTOR_BYTES, DeviceNumber, Mapping, Volume

_PLACE_BYTES: Final = 4096
_TABLE_BYTES: Final = 8192
"""Where the header of a GPT is, for either size of a logical block."""
_GPT: Final = b"EFI PART"
_GONE: Final = frozenset({errno.ENXIO, errno.ENODEV, errno.ENOENT, errno.ENOMEDIUM})


class Outcome(Enum):
    """What a comparison of two samples proves."""

    SAME = "the key is the one that it was"
    OTHER_KEY = "the same ciphertext gives another plaintext"
    OTHER_MEDIUM = "the partition table is another medium's"
    UNKNOWN = "all that was compared has been written since"


@dataclass(frozen=True, slots=True)
class Ciphertexts:
    """What the medium holds."""

    medium: bytes
    """Identifier in the partition table; empty without a table."""
    digests: tuple[int | None, ...]
    """None where it was written while the sample was taken."""

    def unless_written(self, later: Ciphertexts) -> Ciphertexts:
        """Return what was the same when it was read again."""
        both = zip(self.digests, later.digests, strict=True)
        return Ciphertexts(later.medium, tuple(old if old == new else None for old, new in both))


Plaintexts = tuple[int | None, ...]
"""Digests of what the mapping makes of it; None where it cannot be decrypted."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Digests of one moment."""

    plain: Plaintexts
    cipher: Ciphertexts

    def compared(self, after: Sample) -> Outcome:
        """Compare with a later sample of the same volume.

        One piece that is decrypted as before proves the key, since another key changes them all.
        """
        if self.cipher.medium != after.cipher.medium:
            return Outcome.OTHER_MEDIUM
        before = zip(self.plain, self.cipher.digests, strict=False)
        both = zip(before, zip(after.plain, after.cipher.digests, strict=False), strict=False)
        unwritten = [
            (old, new)
            for (old, cipher), (new, later) in both
            if old is not None and cipher is not None and cipher == later
        ]
        if any(old == new for old, new in unwritten):
            return Outcome.SAME
        return Outcome.OTHER_KEY if unwritten else Outcome.UNKNOWN


def plaintexts(mapping: Mapping) -> Plaintexts:
    """Read the sample through the mapping. Raises: KernelError if it has gone or is suspended.

    Nothing below the mapping is opened: at that, the kernel would accept another card in a reader,
    and write to it what is meant for the first (sd_open in drivers/scsi/sd.c).
    """
    crypt = _crypt(mapping)
    pieces: list[int | None] = []
    with _opened(mapping.node, mapping.number) as file:
        _require_running(mapping)
        blocks = Blocks(file, mapping.node)
        for place in _places(crypt):
            try:
                pieces += _digests(blocks.read(place, _PLACE_BYTES), crypt)
            except KernelError as error:
                if error.errno in _GONE:
                    raise
                pieces += [None] * (_PLACE_BYTES // _unit(crypt))
    return tuple(pieces)


def ciphertexts(volume: Volume, mapping: Mapping) -> Ciphertexts:
    """Read the sample from the medium itself. Raises: KernelError if it has gone."""
    crypt = _crypt(mapping)
    with _opened(volume.node, volume.number) as file:
        blocks = Blocks(file, volume.node, crypt.offset * SECTOR_BYTES)
        read = (blocks.read(place, _PLACE_BYTES) for place in _places(crypt))
        digests = [digest for place in read for digest in _digests(place, crypt)]
    return Ciphertexts(_medium(volume), tuple(digests))


def _require_running(mapping: Mapping) -> None:
    """Raises: KernelError if the mapping is suspended: nobody could end a read that waits."""

    def is_suspended() -> str:
        return sysfs_tree.text(sysfs_tree.root(), f"dev/block/{mapping.number}/dm/suspended")

    if (sysfs_tree.known(mapping.name, is_suspended) or "").strip() == "1":
        raise KernelError("compare", mapping.name, errno.EAGAIN, "it is suspended")


def _crypt(mapping: Mapping) -> CryptTarget:
    """Raises: KernelError if the mapping does not decrypt."""
    crypt = CryptTarget.from_line(mapping.table[0]) if mapping.table else None
    if crypt is None:
        raise KernelError("compare", mapping.name, errno.ENXIO)
    return crypt


def _places(crypt: CryptTarget) -> Iterator[int]:
    """Yield where to read.

    Filesystems leave some sectors of the first place alone: what is before the superblock, copies,
    or what is reserved. Where the place is encrypted as one there is a second: the last to be used.
    """
    end = crypt.length * SECTOR_BYTES // _PLACE_BYTES * _PLACE_BYTES
    if end:
        yield 0
    if _unit(crypt) == _PLACE_BYTES and end > _PLACE_BYTES:
        yield end - _PLACE_BYTES


@contextmanager
def _opened(node: str, number: DeviceNumber) -> Iterator[int]:
    """Open the node past the cache. Raises: KernelError if another device is there."""
    with reported_as("open", node):
        file = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        there = os.fstat(file).st_rdev
        if DeviceNumber(os.major(there), os.minor(there)) != number:
            raise KernelError("open", node, errno.ENXIO)
        yield file
    finally:
        os.close(file)


def _unit(crypt: CryptTarget) -> int:
    """Return how many bytes are encrypted as one."""
    sized = (word.partition(":")[2] for word in crypt.options if word.startswith("sector_size:"))
    return int(next(sized, SECTOR_BYTES))


def _digests(content: bytes, crypt: CryptTarget) -> Iterator[int]:
    unit = _unit(crypt)
    for at in range(0, len(content), unit):
        yield hash(content[at : at + unit])


def _medium(volume: Volume) -> bytes:
    """Return the identifier of the disk's partition table. Raises: KernelError."""
    if volume.id.partition == 0:
        return b""
    with reported_as("look at", volume.node):
        disk = f"/dev/{sysfs.disk_name(volume.name)}"
        file = os.open(disk, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        table = Blocks(file, disk).read(0, _TABLE_BYTES)
    finally:
        os.close(file)
    for block in (512, 4096):
        if table[block : block + len(_GPT)] == _GPT:
            return table[block + 56 : block + 72]  # the disk's GUID (UEFI 5.3.2)
    return table[440:444] if table[510:512] == b"\x55\xaa" else b""
