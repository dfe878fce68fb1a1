"""A volume in memory, and every combination measured on it in turn."""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import test_mapping
from caam_hotplug.kernel.loop import Memory, over_memory
from caam_hotplug.kernel.test_mapping import Encryption
from caam_hotplug.model import SECTOR_BYTES, Sectors
from measure.running import MeasureError
from measure.throughput import NAME, drivers, report
from measure.throughput.keys import new_test_keys
from measure.throughput.progress import progress
from measure.throughput.rows import Key, Row, Settings, rows
from measure.throughput.transfers import Transfers


class Bench:
    """A volume in memory, and what is measured on it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._transfers = Transfers(settings)
        self._made = 0
        self._memory: Memory

    def report(self) -> dict[str, Any]:
        """Measure every combination. Raises: HotplugError."""
        absent: dict[str, str] = {}
        size = Sectors(self._settings.size_bytes // SECTOR_BYTES)
        with new_test_keys(absent) as keys, _volume(size) as self._memory:
            for name, why in absent.items():
                print(f"{NAME}: {name} keys are left out: {why}", file=sys.stderr)
            measured = list(rows(self._with_drivers(keys)))
            self._measure(measured)
        if all(row.failure for row in measured if row.key.add is not None):
            raise MeasureError(f"dm-crypt does not work with any key: {measured[-1].failure}")
        return report.made(self._settings, measured, absent)

    def _with_drivers(self, keys: list[Key]) -> Iterator[Key]:
        """Tell who encrypts. The reference is software even if the kernel prefers the CAAM."""
        for key in keys:
            if key.add is None:
                yield key
                continue
            cipher, algorithm, driver = key.cipher, key.algorithm, self._driver(key)
            if key.name == "software" and drivers.is_hardware(driver):
                algorithm = drivers.software(drivers.listed(), algorithm)
                cipher = f"capi:{algorithm}-plain"
                driver = self._driver(Key(key.name, cipher, algorithm, key.add))
            yield Key(key.name, cipher, algorithm, key.add, driver)

    def _driver(self, key: Key) -> str:
        before = drivers.listed()
        try:
            with self._mapped(Row(key)):
                return drivers.used(before, drivers.listed(), key.algorithm)
        except HotplugError:  # its rows will say so
            return drivers.used(before, drivers.listed(), key.algorithm)

    @contextmanager
    def _mapped(self, row: Row) -> Iterator[str]:
        assert row.key.add is not None  # noqa: S101  the bare volume is not mapped
        options = set(row.flags)
        if row.sector_size != SECTOR_BYTES:
            options.add(f"sector_size:{row.sector_size}")
        how = Encryption(row.key.cipher, row.key.add, frozenset(options))
        self._made += 1
        with test_mapping.mapped(names.BENCH, self._memory, how, self._made) as node:
            yield node

    def _measure(self, measured: list[Row]) -> None:
        rounds = self._settings.rounds
        with progress((rounds + 1) * len(measured)) as tell:
            for number in range(rounds + 1):
                # In turn, so that a busy moment is everybody's; and back, so that no one is
                # always first.
                for row in measured if number % 2 == 0 else reversed(measured):
                    tell(f"round {number} of {rounds}" if number else "warming up", str(row))
                    if not row.failure:
                        self._measure_once(row, counts=number > 0)

    def _measure_once(self, row: Row, *, counts: bool) -> None:
        try:
            figures = self._figures(row)
        except (HotplugError, OSError) as error:
            row.failure = str(error)
            row.figures.clear()
            return
        if counts:
            for name, value in figures.items():
                row.figures.setdefault(name, []).append(value)

    def _figures(self, row: Row) -> Mapping[str, float]:
        """Measure the row once. Raises: HotplugError; OSError."""
        if row.key.add is None:
            # Not opened anew: when a device that was open for writing is closed, udevd reads it.
            fcntl.fcntl(self._memory.device, fcntl.F_SETFL, os.O_DIRECT)
            return self._transfers.timed(self._memory.device)
        with ExitStack() as held:
            node = held.enter_context(self._mapped(row))
            file = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            held.callback(os.close, file)
            return self._transfers.timed(file)


@contextmanager
def _volume(size: Sectors) -> Iterator[Memory]:
    with ExitStack() as held:
        try:
            made = held.enter_context(over_memory(names.BENCH.memory, size))
        except OSError as error:
            raise MeasureError(
                f"a loop device cannot be created: {error.strerror}; "
                "load the kernel's module `loop`"
            ) from error
        yield made
