"""What lies on a device, as libblkid finds it: a filesystem, a header, an entry in a table."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import ctypes_lib

_LIBBLKID: Final = "libblkid.so.1"
_BLKID_FLTR_ONLYIN: Final = 2
_AMBIVALENT: Final = -2
_BLKID_SUBLKS_LABEL: Final = 1 << 1
_BLKID_SUBLKS_UUID: Final = 1 << 3
_BLKID_SUBLKS_TYPE: Final = 1 << 5
_BLKID_PARTS_ENTRY_DETAILS: Final = 1 << 2
_PIECE: Final = 512
_LARGEST_SECTOR: Final = 4096
"""Of dm-crypt."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What libblkid reads off a device; None for what it does not have."""

    type: str | None
    label: str | None
    uuid: str | None
    partlabel: str | None = None
    partuuid: str | None = None
    parttype: str | None = None


class _Probe:
    """libblkid's functions, declared at the first probe."""

    def __init__(self) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes_lib.declare(_LIBBLKID, name, result, arguments)

        probe, flag, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        self.new = function("blkid_new_probe", probe)
        self.free = function("blkid_free_probe", None, probe)
        self.set_device = function(
            "blkid_probe_set_device", flag, probe, flag, ctypes.c_int64, ctypes.c_int64
        )
        self.enable_superblocks = function("blkid_probe_enable_superblocks", flag, probe, flag)
        self.superblocks_flags = function("blkid_probe_set_superblocks_flags", flag, probe, flag)
        self.superblocks_only = function(
            "blkid_probe_filter_superblocks_type", flag, probe, flag, ctypes.POINTER(text)
        )
        self.enable_partitions = function("blkid_probe_enable_partitions", flag, probe, flag)
        self.partitions_flags = function("blkid_probe_set_partitions_flags", flag, probe, flag)
        self.safeprobe = function("blkid_do_safeprobe", flag, probe)
        self.lookup = function(
            "blkid_probe_lookup_value", flag, probe, text, ctypes.POINTER(text),
            ctypes.POINTER(ctypes.c_size_t),
        )  # fmt: skip


_loaded: list[_Probe] = []


def _blkid() -> _Probe:
    if not _loaded:
        _loaded.append(_Probe())
    return _loaded[0]


def prepare() -> None:
    """libblkid is open. Raises: OSError if it is not installed."""
    _blkid()


def probe(node: str, allowed: Sequence[str]) -> str | None:
    """The type of the filesystem on the device, if it is one of those allowed, else None.

    Only the allowed types' own detectors look at the bytes. Raises: KernelError if the device
    cannot be read. Blocks for I/O. Source: blkid_do_safeprobe in libblkid.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        wanted = (ctypes.c_char_p * (len(allowed) + 1))(*(name.encode() for name in allowed), None)
        blkid.enable_superblocks(pr, 1)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        blkid.superblocks_only(pr, _BLKID_FLTR_ONLYIN, wanted)
        found = _value(pr, "TYPE") if _found(pr, node) else None
    return None if found == "vfat" and not _has_fat(node) else found


def _has_fat(node: str) -> bool:
    """Whether the file allocation tables of a vfat are such, and not noise.

    With another sector_size than the medium was made with, the first 512 bytes of each larger
    sector still come out right, and the rest does not, or not quite (with CBC, the first 16 bytes
    of each 512). Of a small vfat the kernel checks no more than libblkid does, and would mount
    that. Every table begins with a media descriptor filled up with ones, and a mark of an end. Two
    tables are alike but for what a pull in between has left: what differs everywhere, save for
    where it comes out right anyway, is noise. One table alone that begins well is taken for one.
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
    telling = [
        [table[start : start + _PIECE] for _, table in tables]
        for start in range(0, min(len(table) for _, table in tables), _PIECE)
        if all((at + start) % _LARGEST_SECTOR for at, _ in tables)
    ]
    return len(telling) < 2 or any(len(set(pieces)) == 1 for pieces in telling)


def _begins_as_fat(table: bytes) -> bool:
    """FAT[0] and FAT[1] of 12 bits, 16 or 32: the last bits of the second may be any."""
    return len(table) > 2 and table[0] & table[2] & 0xF0 == 0xF0 and table[1] & 0x0F == 0x0F


def known_contents(node: str) -> str | None:
    """What is known of that lies on the device, in words; None if nothing is.

    All of libblkid's detectors look. Raises: KernelError. Blocks for I/O.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        blkid.enable_superblocks(pr, 1)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        blkid.enable_partitions(pr, 1)
        result = int(blkid.safeprobe(pr))
        if result == _AMBIVALENT:
            return "signatures of more than one kind"
        _require_read(result, node)
        what, table = _value(pr, "TYPE"), _value(pr, "PTTYPE")
        if what is not None:
            return f"{what} (a filesystem, or a header)"
        return None if table is None else f"a partition table ({table})"


def identify(node: str, *, contents: bool = True) -> Identity:
    """What a volume says of itself: its entry in the partition table, a header such as LUKS.

    Without `contents` the partition's own bytes are not looked at, and the entry is all.
    Raises: KernelError. Blocks for I/O. Source: blkid_probe_set_partitions_flags in libblkid.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        blkid.enable_superblocks(pr, contents)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE | _BLKID_SUBLKS_LABEL | _BLKID_SUBLKS_UUID)
        blkid.enable_partitions(pr, 1)
        blkid.partitions_flags(pr, _BLKID_PARTS_ENTRY_DETAILS)
        _found(pr, node)
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
    blkid = _blkid()
    try:
        file = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError("open", node, error.errno or 0) from error
    try:
        pr = blkid.new()
        if not pr:
            raise KernelError("probe", node, errno.ENOMEM)
        try:
            if blkid.set_device(pr, file, 0, 0) != 0:
                raise KernelError("probe", node, ctypes.get_errno() or errno.EIO)
            yield pr
        finally:
            blkid.free(pr)
    finally:
        os.close(file)


def _found(pr: int, node: str) -> bool:
    """Whether the probe found one thing: 0 yes, 1 nothing, -2 more than one, else minus an errno.

    A device that cannot be read must not pass for one with nothing on it.
    """
    result = int(_blkid().safeprobe(pr))
    if result != _AMBIVALENT:
        _require_read(result, node)
    return result == 0


def _require_read(result: int, node: str) -> None:
    if result < 0:
        number = -result if result < -1 else ctypes.get_errno() or errno.EIO
        raise KernelError("probe", node, number)


def _value(pr: int, name: str) -> str | None:
    data, length = ctypes.c_char_p(), ctypes.c_size_t()
    found = _blkid().lookup(pr, name.encode(), ctypes.byref(data), ctypes.byref(length))
    if found != 0 or data.value is None:
        return None
    return data.value.decode(errors="replace")
