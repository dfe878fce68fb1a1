"""Timed reads and writes of a volume; all pass the page cache by (O_DIRECT)."""

from __future__ import annotations

import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from measure.running import MeasureError
from measure.throughput.rows import BLOCK, Settings

SMALL: Final = 4096


class Transfers:
    """The same reads and writes for every volume."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._pattern = os.urandom(BLOCK)
        self._buffers = [mmap.mmap(-1, BLOCK) for _ in range(settings.requests)]
        """Pages of their own, as O_DIRECT wants them."""
        places = range(0, settings.size_bytes, SMALL)
        self._places = random.Random(0).choices(places, k=settings.reads)  # noqa: S311  no secret

    def timed(self, file: int) -> Mapping[str, float]:
        """Measure the volume that is open. Returns: a figure for each column.

        Raises: MeasureError; OSError.
        """
        for buffer in self._buffers:
            buffer[:] = self._pattern
        written = self._sequential(file, os.pwritev)
        for buffer in self._buffers:
            buffer[:] = bytes(BLOCK)
        read = self._sequential(file, os.preadv)
        if any(buffer[:] != self._pattern for buffer in self._buffers):
            raise MeasureError("what was read is not what was written")
        return {
            "write_mb_s": self._settings.size_bytes / written / 1e6,
            "read_mb_s": self._settings.size_bytes / read / 1e6,
            "read_4k_us": self._small_reads(file) * 1e6,
        }

    def _sequential(self, file: int, transfer: Callable[[int, list[mmap.mmap], int], int]) -> float:
        """Transfer the whole volume. Returns: the seconds that it took. Raises: OSError."""
        working = self._buffers
        step = len(working) * BLOCK

        def run(which: int) -> None:
            for at in range(which * BLOCK, self._settings.size_bytes, step):
                if transfer(file, [working[which]], at) != BLOCK:
                    raise MeasureError(f"fewer than {BLOCK} bytes were transferred at {at}")

        with ThreadPoolExecutor(len(working)) as threads:
            begun = time.perf_counter()
            for _ in threads.map(run, range(len(working))):
                pass
            os.fsync(file)
            return time.perf_counter() - begun

    def _small_reads(self, file: int) -> float:
        """Read blocks here and there. Returns: the median of the seconds. Raises: OSError."""
        took = []
        with mmap.mmap(-1, SMALL) as page:
            for place in self._places:
                begun = time.perf_counter()
                os.preadv(file, [page], place)
                took.append(time.perf_counter() - begun)
        return statistics.median(took)
