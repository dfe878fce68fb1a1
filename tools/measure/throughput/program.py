"""The command `measure throughput`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from pathlib import Path
from typing import Any

from caam_hotplug import names
from caam_hotplug.errors import DmError
from caam_hotplug.kernel import devmapper, keyring, memory, test_mapping
from measure import running
from measure.running import MeasureError
from measure.throughput import NAME
from measure.throughput import report as reports
from measure.throughput.bench import Bench
from measure.throughput.rows import MIB, Settings


def run(given: argparse.Namespace) -> int:
    """Measure and print the figures, in whole or not at all. Returns: the exit status."""
    settings = Settings(given.rounds, given.size * MIB, given.in_flight, given.reads)

    def measure_and_tell() -> None:
        report = measure(settings)
        print(json.dumps(report, indent=2) if given.json else reports.table(report))

    return running.exit_status(NAME, measure_and_tell, "interrupted; nothing is left")


def measure(settings: Settings) -> dict[str, Any]:
    """Measure, and remove all that was made for it. Raises: HotplugError."""
    running.require_root("create mappings")
    _require_crypt()
    _require_memory(settings)
    memory.refuse_core_dumps()
    if left := test_mapping.remove_leftovers(names.BENCH):
        print(f"{NAME}: a killed run had left {', '.join(left)}; removed", file=sys.stderr)
    keyring.join_session_keyring()  # before there are threads
    bench = Bench(settings)
    try:
        return bench.report()
    finally:
        # What an interrupt has kept from being removed is named for this process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        test_mapping.remove_leftovers(names.BENCH)


def _require_crypt() -> None:
    try:
        version, why = devmapper.target_version("crypt"), "the kernel has none"
    except DmError as error:
        version, why = None, str(error)
    if version is None:
        raise MeasureError(
            f"dm-crypt is not there: {why}; load the module dm-crypt, or build the kernel with "
            "CONFIG_BLK_DEV_DM and CONFIG_DM_CRYPT"
        )


def _require_memory(settings: Settings) -> None:
    size, buffers = settings.size_bytes // MIB, settings.requests
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024 // MIB
    if free < 2 * (size + buffers):
        raise MeasureError(
            f"a volume of {size} MiB does not fit into memory: only {free} MiB are free, and half "
            f"of them must stay free; use --size {max(1, free // 2 - buffers)}"
        )
