"""Conditions on a volume for a rule to match it: globs, buses, sizes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Set
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Final

from caam_hotplug.model import SECTOR_BYTES, Bus, DevType, Volume

Globs = str | tuple[str, ...]
Buses = Bus | tuple[Bus, ...]


ON_THE_DISK: Final = frozenset({"partlabel", "partuuid", "parttype", "label", "uuid", "header"})
"""Facts that are read from the disk itself; the kernel's event has the first at most."""
IN_THE_TABLE: Final = frozenset({"partlabel", "partuuid", "parttype"})
"""Those of them that a partition's entry in the disk's table has; each entry has one at least."""
OF_UDEV: Final = frozenset({"serial", "vendor", "model", "path"})


def unknown_facts(volume: Volume) -> frozenset[str]:
    """List the facts that neither the kernel nor udev has reported yet."""
    if not volume.awaits_udev:
        return frozenset()
    return OF_UDEV if volume.identified else OF_UDEV | (ON_THE_DISK - {"partlabel"})


def lacks_entry(volume: Volume) -> bool:
    """Whether nobody has found the entry of a partition in the disk's table.

    It is there nevertheless, since the kernel has the partition from there. But a table that was
    written after the kernel has read it may have the partition in another size.
    Source: blkid_partlist_devno_to_partition in libblkid, which udev asks.
    """
    is_partition = volume.devtype is DevType.PARTITION
    return is_partition and all(getattr(volume, fact) is None for fact in IN_THE_TABLE)


class Bytes(int):
    """A size in bytes, written as a number or as a text such as `64MiB`."""

    UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    FORM: Final = re.compile(r"([0-9]{1,20}) *(|KiB|MiB|GiB|TiB)")

    @classmethod
    def from_text(cls, text: str) -> Bytes:
        """Parse `64MiB`. Raises: ValueError for any other form."""
        size = cls.FORM.fullmatch(text)
        if size is None:
            raise ValueError(f"expected a size such as 512MiB or 64GiB, found {text!r}")
        return cls(int(size[1]) * cls.UNITS[size[2]])


def is_exact(globs: Globs | None) -> bool:
    """Whether there are globs, and each of them stands for one text alone (fnmatch)."""
    found = (globs,) if isinstance(globs, str) else globs or ()
    return bool(found) and not any(set(glob) & set("*?[") for glob in found)


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """Conditions on a volume. An absent key asks for nothing; a list means any of its entries."""

    partlabel: Globs | None = None
    """Globs for the partition's label in the partition table."""
    partuuid: Globs | None = None
    """Globs for the partition's identifier in the partition table."""
    parttype: Globs | None = None
    """Globs for the partition's type identifier in the partition table."""
    label: Globs | None = None
    """Globs for the label of a filesystem or LUKS header that is there in clear."""
    uuid: Globs | None = None
    """Globs for the identifier of a filesystem or LUKS header that is there in clear."""
    serial: Globs | None = None
    """Globs for the disk's serial number."""
    vendor: Globs | None = None
    """Globs for the disk's vendor."""
    model: Globs | None = None
    """Globs for the disk's model."""
    path: Globs | None = None
    """Globs for the socket that the disk sits in, udev's ID_PATH."""
    bus: Buses | None = None
    """Buses that the disk may be attached to."""
    removable: bool | None = None
    """Whether users may pull the disk: the kernel's flag, or a USB stick, or an SD card."""
    devtype: DevType = DevType.PARTITION
    """Kind of device: a partition, or a whole disk."""
    min_size: Bytes | None = None
    """Least size of the volume, in bytes or as a text such as 64MiB."""
    max_size: Bytes | None = None
    """Greatest size of the volume, in bytes or as a text such as 64GiB."""

    def failures(self, volume: Volume, unknown: Set[str] = frozenset()) -> Iterator[str]:
        """Yield, in words, the conditions that the volume does not meet, in the order of the keys.

        A fact that is not known fails no condition.
        """
        for name in _MATCH_KEYS:
            wanted = getattr(self, name)
            if wanted is None or name in unknown:
                continue
            match name:
                case "min_size" | "max_size":
                    size = volume.size * SECTOR_BYTES
                    if size < wanted if name == "min_size" else size > wanted:
                        yield f"{name} is {wanted} bytes, the volume has {size}"
                case "bus":
                    buses = wanted if isinstance(wanted, tuple) else (wanted,)
                    if volume.bus not in buses:
                        listed = ", ".join(bus.value for bus in buses)
                        yield f"bus is {volume.bus.value}, not {listed}"
                case "removable":
                    if volume.removable != wanted:
                        yield f"removable is {_toml(volume.removable)}, not {_toml(wanted)}"
                case "devtype":
                    if volume.devtype is not wanted:
                        yield f"devtype is {volume.devtype.value}, not {wanted.value}"
                case _:
                    yield from _glob_failure(name, getattr(volume, name), wanted)


_MATCH_KEYS: Final = tuple(f.name for f in fields(Match))


def _toml(value: bool) -> str:
    """Spell the value as TOML does."""
    return "true" if value else "false"


def _glob_failure(name: str, value: str | None, wanted: Globs) -> Iterator[str]:
    """Yield why none of the globs fits the value, or nothing."""
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    if value is not None and any(fnmatchcase(value, pattern) for pattern in patterns):
        return
    listed = ", ".join(repr(pattern) for pattern in patterns)
    if value is None:
        yield f"{name} is not there, so it is not {listed}"
    else:
        yield f"{name} is {value!a}, not {listed}"
