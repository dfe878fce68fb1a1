"""What is measured: the settings, the keys, and a row for each combination."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from caam_hotplug.kernel.test_mapping import AddKey
from caam_hotplug.model import SECTOR_BYTES

MIB: Final = 1 << 20
BLOCK: Final = MIB
"""Of a sequential request: the most that dm-crypt has in one piece on most kernels."""
SECTOR_SIZES: Final = (512, 4096)
FLAGS: Final = (
    (),
    ("no_read_workqueue",),
    ("no_write_workqueue",),
    ("no_read_workqueue", "no_write_workqueue"),
    ("same_cpu_crypt",),
    ("submit_from_crypt_cpus",),
)
COLUMNS: Final = {
    "write_mb_s": "write MB/s",
    "read_mb_s": "read MB/s",
    "read_4k_us": "4 KiB read us",
}


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int
    size_bytes: int
    in_flight: int
    reads: int

    @property
    def requests(self) -> int:
        """How many are in flight: no more than a volume of this size has use for."""
        return min(self.in_flight, self.size_bytes // BLOCK)


@dataclass(frozen=True, slots=True)
class Key:
    """A test key, or none, and the cipher that goes with it."""

    name: str
    cipher: str
    algorithm: str
    """As /proc/crypto names what dm-crypt asks for."""
    add: AddKey | None
    """None for the volume itself."""
    driver: str = ""
    """Who encrypts."""


@dataclass(slots=True)
class Row:
    """One combination, and what was measured of it in each round."""

    key: Key
    sector_size: int = SECTOR_BYTES
    flags: tuple[str, ...] = ()
    figures: dict[str, list[float]] = field(default_factory=dict)
    failure: str = ""
    """Why there are no figures, if the kernel does not do this."""

    @property
    def is_reference(self) -> bool:
        """Is it the row that all others are compared with?"""
        return (self.key.name, self.sector_size, self.flags) == ("software", SECTOR_BYTES, ())

    def __str__(self) -> str:
        if self.key.add is None:
            return self.key.name
        return f"{self.key.name} {self.sector_size} {' '.join(self.flags) or 'no flags'}"


def rows(keys: Iterable[Key]) -> Iterator[Row]:
    """Combine each key with each sector size and each set of flags."""
    for key in keys:
        if key.add is None:
            yield Row(key)
            continue
        for sector_size in SECTOR_SIZES:
            for flags in FLAGS:
                yield Row(key, sector_size, flags)
