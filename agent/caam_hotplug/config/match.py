"""What a volume must be for a rule to match it: globs, buses, sizes."""

from __future__ import annotations

import string
from collections.abc import Iterator
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Final

from caam_hotplug.model import SECTOR_BYTES, Bus, DevType, Volume

Globs = str | tuple[str, ...]
Buses = Bus | tuple[Bus, ...]


ON_THE_TABLE: Final = frozenset({"partlabel", "partuuid", "parttype"})
"""What a look at the partition table tells; of these the kernel's event has a label at most."""
_OF_UDEV: Final = frozenset({"label", "uuid", "serial", "vendor", "model", "path"})


def unknown_facts(volume: Volume) -> frozenset[str]:
    """The facts that nobody has told of the volume yet."""
    if not volume.awaits_udev:
        return frozenset()
    return _OF_UDEV if volume.identified else _OF_UDEV | (ON_THE_TABLE - {"partlabel"})


class Bytes(int):
    """A size in bytes, written as a number or as a text such as `64MiB`."""

    UNITS: Final = {"": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

    @classmethod
    def from_text(cls, text: str) -> Bytes:
        """Parse `64MiB`. Raises: ValueError for any other form."""
        digits = text.rstrip(string.ascii_letters)
        unit = text[len(digits) :]
        digits = digits.rstrip(" ")
        is_number = digits.isascii() and digits.isdigit() and len(digits) <= 20
        if not is_number or unit not in cls.UNITS:
            raise ValueError(f"expected a size such as 512MiB or 64GiB, found {text!r}")
        return cls(int(digits) * cls.UNITS[unit])


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """What a volume must be. Absent keys ask for nothing; a list means any of."""

    partlabel: Globs | None = None
    partuuid: Globs | None = None
    parttype: Globs | None = None
    label: Globs | None = None
    uuid: Globs | None = None
    serial: Globs | None = None
    vendor: Globs | None = None
    model: Globs | None = None
    path: Globs | None = None
    bus: Buses | None = None
    removable: bool | None = None
    devtype: DevType = DevType.PARTITION
    min_size: Bytes | None = None
    max_size: Bytes | None = None

    def failures(self, volume: Volume) -> Iterator[str]:
        """The conditions that the volume does not meet, in words, in the order of the keys.

        What is not known of it yet fails no condition.
        """
        unknown = unknown_facts(volume)
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
    return "true" if value else "false"


def _glob_failure(name: str, value: str | None, wanted: Globs) -> Iterator[str]:
    patterns = (wanted,) if isinstance(wanted, str) else wanted
    listed = ", ".join(repr(pattern) for pattern in patterns)
    if value is None:
        yield f"{name} is not there, so it is not {listed}"
    elif not any(fnmatchcase(value, pattern) for pattern in patterns):
        yield f"{name} is {value!a}, not {listed}"
