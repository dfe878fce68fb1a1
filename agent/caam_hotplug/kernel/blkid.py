"""The contents of a device, through libblkid: a filesystem, a header, an entry in a table."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import (
    Function,
    Library,
    failed,
    minus_one,
    null,
    reported_as,
)

_BLKID_FLTR_ONLYIN: Final = 2
_FOUND: Final = 0
_AMBIVALENT: Final = -2
"""Of blkid_do_safeprobe, beside 1 for nothing."""
_BLKID_SUBLKS_LABEL: Final = 1 << 1
_BLKID_SUBLKS_UUID: Final = 1 << 3
_BLKID_SUBLKS_TYPE: Final = 1 << 5
_IDENTITY_FLAGS: Final = _BLKID_SUBLKS_TYPE | _BLKID_SUBLKS_LABEL | _BLKID_SUBLKS_UUID
_BLKID_PARTS_ENTRY_DETAILS: Final = 1 << 2
_PIECE: Final = 512
_LARGEST_SECTOR: Final = 4096
"""Of dm-crypt."""


@dataclass(frozen=True, slots=True)
class Identity:
    """A device's labels and identifiers; None for those that it does not have."""

    type: str | None
    label: str | None
    uuid: str | None
    partlabel: str | None = None
    partuuid: str | None = None
    parttype: str | None = None


def _probe_failed(result: int, function: Any, _arguments: tuple[Any, ...]) -> int:
    """Raise for a result below zero: minus an error number, or -1 with errno.

    A device that cannot be read must not pass for an empty one.
    """
    if result < 0 and result != _AMBIVALENT:
        raise failed(function, ctypes.get_errno() if result == -1 else -result)
    return result


class Blkid(Library, soname="libblkid.so.1", package="libblkid1"):
    """Source: blkid.h."""

    blkid_do_safeprobe = Function(c_int, c_void_p, failure=_probe_failed)
    blkid_free_probe = Function(None, c_void_p)
    blkid_new_probe = Function(c_void_p, failure=null)
    blkid_probe_enable_partitions = Function(c_int, c_void_p, c_int, failure=minus_one)
    blkid_probe_enable_superblocks = Function(c_int, c_void_p, c_int, failure=minus_one)
    blkid_probe_filter_superblocks_type = Function(
        c_int, c_void_p, c_int, POINTER(c_char_p), failure=minus_one
    )
    blkid_probe_lookup_value = Function(
        c_int, c_void_p, c_char_p, POINTER(c_char_p), POINTER(c_size_t)
    )
    """-1 if there is no such value: the pointer is as it was."""
    blkid_probe_set_device = Function(c_int, c_void_p, c_int, c_int64, c_int64, failure=minus_one)
    blkid_probe_set_partitions_flags = Function(c_int, c_void_p, c_int, failure=minus_one)
    blkid_probe_set_superblocks_flags = Function(c_int, c_void_p, c_int, failure=minus_one)


def probe(node: str, allowed: Sequence[str]) -> str | None:
    """Return the type of the filesystem on the device if it is one of those allowed, else None.

    Only the allowed types' own detectors see the bytes. Raises: KernelError if the device
    cannot be read. Blocks for I/O. Source: blkid_do_safeprobe in libblkid.
    """
    with _probing(node) as pr:
        wanted = (c_char_p * (len(allowed) + 1))(*(name.encode() for name in allowed), None)
        Blkid.blkid_probe_enable_superblocks(pr, 1)
        Blkid.blkid_probe_set_superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        Blkid.blkid_probe_filter_superblocks_type(pr, _BLKID_FLTR_ONLYIN, wanted)
        found = _value(pr, "TYPE") if Blkid.blkid_do_safeprobe(pr) == _FOUND else None
    return None if found == "vfat" and not _has_fat(node) else found


def _has_fat(node: str) -> bool:
    """Return whether the file allocation tables of a vfat are plausible.

    If sector_size is not that of the medium, the first 512 bytes of each larger sector are still
    decrypted correctly. The rest is noise (with CBC, the first 16 bytes of each 512). On a small
    vfat the kernel checks no more than libblkid does, and would mount that. Every table begins with
    a media descriptor filled up with ones, and an end mark. Two tables differ only by what a pull
    between their writes has left. If all sectors differ that the wrong size would garble, they are
    noise. A single table that begins well is accepted.
    Source: Microsoft's FAT specification (fatgen103), BPB, FAT[0] and FAT[1].
    """
    try:
        with Path(node).open("rb", buffering=0) as device:
            boot = device.read(_PIECE)
            sector, reserved, count, short = struct.unpack_from("<H x H B 5x H", boot, 11)
            (long,) = struct.unpack_from("<I", boot, 36)
            first, length = sector * reserved, (short or long) * sector
            tables = []
            for at in (first, first + length)[:count]:
                device.seek(at)
                tables.append((at, device.read(min(length, _LARGEST_SECTOR))))
    except (OSError, struct.error) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise KernelError("read", node, number or errno.EIO) from error
    if not tables or not _begins_as_fat(tables[0][1]):
        return False
    garbled = [
        [table[start : start + _PIECE] for _, table in tables]
        for start in range(0, min(len(table) for _, table in tables), _PIECE)
        if all((at + start) % _LARGEST_SECTOR for at, _ in tables)
    ]
    return len(garbled) < 2 or any(len(set(pieces)) == 1 for pieces in garbled)


def _begins_as_fat(table: bytes) -> bool:
    """Return whether FAT[0] and FAT[1] are valid, of 12, 16 or 32 bits, but for the last bits."""
    return len(table) > 2 and table[0] & table[2] & 0xF0 == 0xF0 and table[1] & 0x0F == 0x0F


def known_contents(node: str) -> str | None:
    """Describe what lies on the device, or return None if libblkid recognises nothing.

    All of libblkid's detectors see the bytes. Raises: KernelError. Blocks for I/O.
    """
    with _probing(node) as pr:
        Blkid.blkid_probe_enable_superblocks(pr, 1)
        Blkid.blkid_probe_set_superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        Blkid.blkid_probe_enable_partitions(pr, 1)
        if Blkid.blkid_do_safeprobe(pr) == _AMBIVALENT:
            return "signatures of more than one kind"
        what, table = _value(pr, "TYPE"), _value(pr, "PTTYPE")
        if what is not None:
            return f"{what} (a filesystem, or a header)"
        return None if table is None else f"a partition table ({table})"


def identify(node: str, *, contents: bool = True) -> Identity:
    """Read a volume's entry in the partition table, and a header such as LUKS.

    Without `contents` the partition's own bytes are not read, and the entry is all.
    Raises: KernelError. Blocks for I/O. Source: blkid_probe_set_partitions_flags in libblkid.
    """
    with _probing(node) as pr:
        Blkid.blkid_probe_enable_superblocks(pr, contents)
        Blkid.blkid_probe_set_superblocks_flags(pr, _IDENTITY_FLAGS)
        Blkid.blkid_probe_enable_partitions(pr, 1)
        Blkid.blkid_probe_set_partitions_flags(pr, _BLKID_PARTS_ENTRY_DETAILS)
        Blkid.blkid_do_safeprobe(pr)
        return Identity(
            type=_value(pr, "TYPE"),
            label=_value(pr, "LABEL"),
            uuid=_value(pr, "UUID"),
            partlabel=_value(pr, "PART_ENTRY_NAME"),
            partuuid=_value(pr, "PART_ENTRY_UUID"),
            parttype=_value(pr, "PART_ENTRY_TYPE"),
        )


@contextmanager
def _probing(node: str) -> Iterator[int]:
    """Yield a probe of the device. Raises: KernelError, also for the block's failed calls."""
    with reported_as("open", node):
        file = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        with reported_as("probe", node):
            pr = Blkid.blkid_new_probe()
            try:
                Blkid.blkid_probe_set_device(pr, file, 0, 0)
                yield pr
            finally:
                Blkid.blkid_free_probe(pr)
    finally:
        os.close(file)


def _value(pr: int, name: str) -> str | None:
    value, length = c_char_p(), c_size_t()
    Blkid.blkid_probe_lookup_value(pr, name.encode(), byref(value), byref(length))
    return None if value.value is None else value.value.decode(errors="replace")
