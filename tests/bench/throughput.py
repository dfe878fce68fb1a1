#!/usr/bin/env python3
"""Measures dm-crypt over memory with the keys that this board's kernel can seal; needs root.

A volume in memory is encrypted with a throwaway key of each kind: tagged (sealed by the CAAM
through /dev/caam-keygen), trusted (by the kernel's trust source), and one in software as the
reference; each with two sizes of sector and with dm-crypt's flags. No medium and no file is
touched, and nothing is left. docs/throughput.md says what the figures mean and which settings
follow from them.

It needs the caam_hotplug package of its own version: installed, or beside it in a checkout.
"""

from __future__ import annotations

import argparse
import datetime
import fcntl
import importlib.util
import json
import mmap
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NoReturn, cast

PROGRAM: Final = "throughput.py"
_HOMES: Final = (
    Path(__file__).resolve().parent.parent.parent / "agent",
    Path("/usr/lib/caam-hotplug"),
    Path("/usr/local/lib/caam-hotplug"),
)
"""Where the package is if Python does not find it: the agent has a folder of its own."""
if importlib.util.find_spec("caam_hotplug") is None:
    sys.path[:0] = [str(home) for home in _HOMES if (home / "caam_hotplug").is_dir()]

try:
    from caam_hotplug import __version__, names
    from caam_hotplug.errors import DmError, HotplugError
    from caam_hotplug.formats import blobs
    from caam_hotplug.formats.crypt_table import CIPHERS
    from caam_hotplug.kernel import caam, devmapper, keyring, memory, test_mapping, trusted
    from caam_hotplug.kernel.loop import Memory, over_memory
    from caam_hotplug.kernel.test_mapping import AddKey, Encryption
    from caam_hotplug.model import SECTOR_BYTES, Sectors
except ImportError as error:
    sys.exit(
        f"{PROGRAM}: import caam_hotplug: {error}; install caam-hotplug of this script's version, "
        "or run it with PYTHONPATH=CHECKOUT/agent"
    )

MIB: Final = 1 << 20
BLOCK: Final = MIB
"""Of a sequential request: the most that dm-crypt has in one piece on most kernels."""
SMALL: Final = 4096
SECTOR_SIZES: Final = (512, 4096)
FLAGS: Final = (
    (),
    ("no_read_workqueue",),
    ("no_write_workqueue",),
    ("no_read_workqueue", "no_write_workqueue"),
    ("same_cpu_crypt",),
    ("submit_from_crypt_cpus",),
)
TAGGED_BYTES: Final = 16
TRUSTED_BYTES: Final = 64
SOFTWARE_BYTES: Final = 16
HARDWARE: Final = ("caam", "dcp")
"""What stands in the names of the drivers of NXP's crypto blocks."""
SOFTWARE_ANYWAY: Final = "cbc(aes-generic)"
"""Software by its driver's name, if a slow one."""

EXAMPLES: Final = """\
examples:
  sudo python3 throughput.py                        some minutes; the table
  sudo python3 throughput.py --json > board.json    the same for programs, and to send to others
  sudo python3 throughput.py --rounds 2 --size 16   quickly, for a first look

exit status: 0 it was measured; 1 it could not be; 2 wrong usage; 130 interrupted
"""


class BenchError(HotplugError):
    """It cannot be measured; operation, subject, cause and what to do are in the words."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How much is measured."""

    rounds: int
    size_bytes: int
    in_flight: int
    reads: int


@dataclass(frozen=True, slots=True)
class Key:
    """A throwaway key, or none, and the cipher that goes with it."""

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
        return (self.key.name, self.sector_size, self.flags) == ("software", SECTOR_BYTES, ())

    def __str__(self) -> str:
        if self.key.add is None:
            return self.key.name
        return f"{self.key.name} {self.sector_size} {' '.join(self.flags) or 'no flags'}"


COLUMNS: Final = {
    "write_mb_s": "write MB/s",
    "read_mb_s": "read MB/s",
    "read_4k_us": "4 KiB read us",
}


def main() -> int:
    """The figures are on standard output, in whole or not at all. Returns: the exit status."""
    settings, as_json = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _ended)
    try:
        report = _measured(settings)
    except HotplugError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted; nothing is left", file=sys.stderr)
        return 128 + signal.SIGINT
    print(json.dumps(report, indent=2) if as_json else table(report))
    return 0


def _ended(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _arguments() -> tuple[Settings, bool]:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--rounds", type=_count, default=5, metavar="N",
        help="how often each is measured, after one round that does not count (5)",
    )  # fmt: skip
    parser.add_argument(
        "--size", type=_count, default=32, metavar="MIB",
        help="the volume's size; it takes as much memory (32)",
    )  # fmt: skip
    parser.add_argument(
        "--in-flight", type=_count, default=4, metavar="N",
        help="sequential requests at a time, as readahead and writeback have them (4)",
    )  # fmt: skip
    parser.add_argument(
        "--reads", type=_count, default=500, metavar="N",
        help="reads of 4 KiB in a round, one at a time (500)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    given = parser.parse_args()
    return Settings(given.rounds, given.size * MIB, given.in_flight, given.reads), given.json


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


# -- what there is ---------------------------------------------------------------------------------


def _measured(settings: Settings) -> dict[str, Any]:
    """Raises: HotplugError."""
    _require_root()
    _require_crypt()
    _require_memory(settings)
    memory.refuse_core_dumps()
    if left := test_mapping.remove_leftovers(names.BENCH):
        print(f"{PROGRAM}: a killed run had left {', '.join(left)}; removed", file=sys.stderr)
    keyring.join_session_keyring()  # before there are threads
    bench = Bench(settings)
    try:
        return bench.report()
    finally:
        # What an interrupt has kept from being removed is named for this process.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        test_mapping.remove_leftovers(names.BENCH)


def _require_root() -> None:
    if os.geteuid() != 0:
        raise BenchError("measure dm-crypt: only root makes mappings; run it with sudo")


def _require_crypt() -> None:
    try:
        version, why = devmapper.target_version("crypt"), "the kernel has none"
    except DmError as error:
        version, why = None, str(error)
    if version is None:
        raise BenchError(
            f"look for dm-crypt: {why}; load the module dm-crypt, or build the kernel with "
            "CONFIG_BLK_DEV_DM and CONFIG_DM_CRYPT"
        )


def _in_flight(settings: Settings) -> int:
    """No more than a volume of this size has use for."""
    return min(settings.in_flight, settings.size_bytes // BLOCK)


def _require_memory(settings: Settings) -> None:
    size, buffers = settings.size_bytes // MIB, _in_flight(settings)
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(facts["MemAvailable"].split()[0]) * 1024 // MIB
    if free < 2 * (size + buffers):
        raise BenchError(
            f"make a volume of {size} MiB in memory: only {free} MiB are free, and half of them "
            f"shall stay so; use --size {max(1, free // 2 - buffers)}"
        )


@contextmanager
def _keys(absent: dict[str, str]) -> Iterator[list[Key]]:
    """A key of each kind that this kernel has; of the others `absent` says why not.

    Raises: BenchError if it has none that is sealed.
    """
    with ExitStack() as held:
        plain = held.enter_context(memory.random_key(SOFTWARE_BYTES))
        add = test_mapping.logon_key(plain)
        found = [
            Key("bare", "", "", None),
            Key("software", "capi:cbc(aes)-plain", "cbc(aes)", add),
        ]
        try:
            blob = caam.create_blob(names.CAAM_DEVICE, "ecb", TAGGED_BYTES)
            black = held.enter_context(caam.import_blob(names.CAAM_DEVICE, blob))
            add = test_mapping.logon_key(black)
            found.append(Key("tagged", CIPHERS["logon"], "tk(cbc(aes))", add))
        except HotplugError as error:
            absent["tagged"] = str(error)
        try:
            trusted.is_offered()  # and loaded
            sealed = blobs.parse(trusted.seal_trusted(TRUSTED_BYTES), "trusted")
            add = test_mapping.trusted_key(cast(blobs.Trusted, sealed), TRUSTED_BYTES)
            found.append(Key("trusted", CIPHERS["trusted"], "xts(aes)", add))
        except HotplugError as error:
            absent["trusted"] = str(error)
        if len(absent) == 2:
            raise BenchError(
                f"seal a key: this kernel does it in no way; tagged: {absent['tagged']}; trusted: "
                f"{absent['trusted']}; `caam-hotplug doctor` says what is missing"
            )
        yield found


# -- who encrypts ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Driver:
    """An implementation that the kernel has of an algorithm, as /proc/crypto has it."""

    name: str
    algorithm: str
    priority: int
    users: int
    is_internal: bool


def drivers(text: str) -> list[Driver]:
    """Those of /proc/crypto: blocks of `name : value`."""
    found = []
    for block in text.strip().split("\n\n"):
        lines = (line.partition(":") for line in block.splitlines())
        of = {name.strip(): value.strip() for name, _, value in lines}
        found.append(
            Driver(of["driver"], of["name"], int(of["priority"]), int(of["refcnt"]),
                   of.get("internal") == "yes")
        )  # fmt: skip
    return found


def used(before: list[Driver], after: list[Driver], algorithm: str) -> str:
    """Which driver has more users than before; by priority if several have, or none tells.

    Priority alone would mislead: dm-crypt passes over drivers that allocate memory for a request,
    which /proc/crypto does not show (CRYPTO_ALG_ALLOCATES_MEMORY in dm-crypt.c).
    """
    users = {driver.name: driver.users for driver in before}
    able = [d for d in after if algorithm in (d.algorithm, d.name) and not d.is_internal]
    taken = [driver for driver in able if driver.users > users.get(driver.name, 1)]
    return max(taken or able, key=lambda driver: driver.priority).name if able else "unknown"


def software(listed: list[Driver], algorithm: str) -> str:
    """The software that the kernel likes best for it."""
    able = [
        driver
        for driver in listed
        if driver.algorithm == algorithm
        and not driver.is_internal
        and not any(word in driver.name for word in HARDWARE)
    ]
    return max(able, key=lambda driver: driver.priority).name if able else SOFTWARE_ANYWAY


def _crypto() -> list[Driver]:
    return drivers(Path("/proc/crypto").read_text())


# -- measuring -------------------------------------------------------------------------------------


class Bench:
    """A volume in memory, and what is measured on it."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made = 0
        self._memory: Memory
        self._pattern = os.urandom(BLOCK)
        self._buffers = [mmap.mmap(-1, BLOCK) for _ in range(_in_flight(settings))]
        """Pages of their own, as O_DIRECT wants them."""
        places = range(0, settings.size_bytes, SMALL)
        self._places = random.Random(0).choices(places, k=settings.reads)

    def report(self) -> dict[str, Any]:
        """All was measured. Raises: HotplugError."""
        absent: dict[str, str] = {}
        size = Sectors(self._settings.size_bytes // SECTOR_BYTES)
        with _keys(absent) as keys, self._volume(size) as self._memory:
            for name, why in absent.items():
                print(f"{PROGRAM}: {name} keys are left out: {why}", file=sys.stderr)
            rows = list(_rows(self._with_drivers(keys)))
            self._measure(rows)
        if all(row.failure for row in rows if row.key.add is not None):
            raise BenchError(f"measure dm-crypt: nothing works: {rows[-1].failure}")
        return _report(self._settings, rows, absent)

    @contextmanager
    def _volume(self, size: Sectors) -> Iterator[Memory]:
        with ExitStack() as held:
            try:
                made = held.enter_context(over_memory(names.BENCH.memory, size))
            except OSError as error:
                raise BenchError(
                    f"make a loop device: {error.strerror}; load the kernel's module `loop`"
                ) from error
            yield made

    def _with_drivers(self, keys: list[Key]) -> Iterator[Key]:
        """The keys with who encrypts; the reference is software even if the CAAM is preferred."""
        for key in keys:
            if key.add is None:
                yield key
                continue
            cipher, algorithm, driver = key.cipher, key.algorithm, self._driver(key, key.cipher)
            if key.name == "software" and any(word in driver for word in HARDWARE):
                algorithm = software(_crypto(), algorithm)
                cipher = f"capi:{algorithm}-plain"
                driver = self._driver(Key(key.name, cipher, algorithm, key.add), cipher)
            yield Key(key.name, cipher, algorithm, key.add, driver)

    def _driver(self, key: Key, cipher: str) -> str:
        before = _crypto()
        try:
            with self._mapped(Row(key)):
                return used(before, _crypto(), key.algorithm)
        except HotplugError:  # its rows will say so
            return used(before, _crypto(), key.algorithm)

    @contextmanager
    def _mapped(self, row: Row) -> Iterator[str]:
        assert row.key.add is not None
        options = set(row.flags)
        if row.sector_size != SECTOR_BYTES:
            options.add(f"sector_size:{row.sector_size}")
        how = Encryption(row.key.cipher, row.key.add, frozenset(options))
        self._made += 1
        with test_mapping.mapped(names.BENCH, self._memory, how, self._made) as node:
            yield node

    def _measure(self, rows: list[Row]) -> None:
        rounds = self._settings.rounds
        with _progress((rounds + 1) * len(rows)) as tell:
            for number in range(rounds + 1):
                # In turn, so that a busy moment is everybody's; and back, so that no one is
                # always first.
                for row in rows if number % 2 == 0 else reversed(rows):
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
        """Raises: HotplugError; OSError."""
        if row.key.add is None:
            # Not opened anew: when a device that was open for writing is closed, udevd reads it.
            fcntl.fcntl(self._memory.device, fcntl.F_SETFL, os.O_DIRECT)
            return self._timed(self._memory.device)
        with ExitStack() as held:
            node = held.enter_context(self._mapped(row))
            file = os.open(node, os.O_RDWR | os.O_DIRECT | os.O_CLOEXEC)
            held.callback(os.close, file)
            return self._timed(file)

    def _timed(self, file: int) -> Mapping[str, float]:
        for buffer in self._buffers:
            buffer[:] = self._pattern
        written = self._sequential(file, os.pwritev)
        for buffer in self._buffers:
            buffer[:] = bytes(BLOCK)
        read = self._sequential(file, os.preadv)
        if any(buffer[:] != self._pattern for buffer in self._buffers):
            raise BenchError("read what was written: it is not the same")
        return {
            "write_mb_s": self._settings.size_bytes / written / 1e6,
            "read_mb_s": self._settings.size_bytes / read / 1e6,
            "read_4k_us": self._small_reads(file) * 1e6,
        }

    def _sequential(self, file: int, transfer: Callable[[int, list[mmap.mmap], int], int]) -> float:
        """How long it took for the whole volume, in seconds. Raises: OSError."""
        working = self._buffers
        step = len(working) * BLOCK

        def run(which: int) -> None:
            for at in range(which * BLOCK, self._settings.size_bytes, step):
                if transfer(file, [working[which]], at) != BLOCK:
                    raise BenchError(f"transfer {BLOCK} bytes at {at}: fewer came")

        with ThreadPoolExecutor(len(working)) as threads:
            begun = time.perf_counter()
            for _ in threads.map(run, range(len(working))):
                pass
            os.fsync(file)
            return time.perf_counter() - begun

    def _small_reads(self, file: int) -> float:
        """How long one took, in seconds: the median of this round. Raises: OSError."""
        took = []
        with mmap.mmap(-1, SMALL) as page:
            for place in self._places:
                begun = time.perf_counter()
                os.preadv(file, [page], place)
                took.append(time.perf_counter() - begun)
        return statistics.median(took)


def _rows(keys: Iterator[Key]) -> Iterator[Row]:
    for key in keys:
        if key.add is None:
            yield Row(key)
            continue
        for sector_size in SECTOR_SIZES:
            for flags in FLAGS:
                yield Row(key, sector_size, flags)


@contextmanager
def _progress(count: int) -> Iterator[Callable[[str, str], None]]:
    """Yields what to call before each step: a line that changes on a terminal, else one a round."""
    is_terminal = sys.stderr.isatty()
    done = 0
    last = ""

    def tell(stage: str, what: str) -> None:
        nonlocal done, last
        if is_terminal:
            percent = 100 * done // count
            print(f"\r\033[K{stage}, {percent} %: {what}", end="", file=sys.stderr, flush=True)
        elif stage != last:
            print(stage, file=sys.stderr, flush=True)
        done, last = done + 1, stage

    try:
        yield tell
    finally:
        if is_terminal:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


# -- telling ---------------------------------------------------------------------------------------


def _report(settings: Settings, rows: list[Row], absent: dict[str, str]) -> dict[str, Any]:
    (reference,) = (row for row in rows if row.is_reference)
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "caam_hotplug": __version__,
        "kernel": os.uname().release,
        "machine": _text("/proc/device-tree/model"),
        "architecture": os.uname().machine,
        "cpus": os.cpu_count(),
        "governor": _text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "rounds": settings.rounds,
        "size_mib": settings.size_bytes // MIB,
        "in_flight": settings.in_flight,
        "reads": settings.reads,
        "left_out": absent,
        "rows": [_told(row, reference) for row in rows],
    }


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text(errors="replace").strip("\0\n")
    except OSError:
        return None


def _told(row: Row, reference: Row) -> dict[str, Any]:
    told: dict[str, Any] = {"key": row.key.name}
    if row.key.add is not None:
        told |= {
            "cipher": row.key.cipher,
            "driver": row.key.driver,
            "sector_size": row.sector_size,
            "flags": list(row.flags),
        }
    if row.failure:
        return {**told, "failed": row.failure}
    for column in COLUMNS:
        values = row.figures[column]
        median, base = statistics.median(values), reference.figures.get(column)
        told[column] = {
            "median": round(median, 2),
            "min": round(min(values), 2),
            "max": round(max(values), 2),
            "ratio": round(median / statistics.median(base), 3) if base else None,
        }
    return told


def table(report: Mapping[str, Any]) -> str:
    """The report for people."""
    about = [report["machine"] or report["architecture"], f"Linux {report['kernel']}"]
    about += [f"{report['cpus']} CPUs"]
    if report["governor"]:
        about.append(f"governor {report['governor']}")
    lines = [
        f"{report['date'][:10]}, {', '.join(about)}",
        f"{report['size_mib']} MiB in memory; sequential requests of 1 MiB, "
        f"{report['in_flight']} at a time; 4 KiB reads one at a time; O_DIRECT",
        f"medians of {report['rounds']} rounds (least-most), x ratio to software with sectors of "
        "512 bytes and no flags",
    ]
    lines += [f"left out: {name}: {why}" for name, why in report["left_out"].items()]
    titles = "".join(f"{title:>23}" for title in COLUMNS.values())
    key = None
    for row in report["rows"]:
        if row["key"] != key:
            key = row["key"]
            by = f": {row['cipher']}, by {row['driver']}" if "cipher" in row else ": no dm-crypt"
            lines += ["", f"{key}{by}", f"  {'sector':<8}{'flags':<36}{titles}"]
        if "cipher" in row:
            what = f"  {row['sector_size']:<8}{' '.join(row['flags']) or 'none':<36}"
        else:
            what = f"  {'-':<8}{'-':<36}"
        if "failed" in row:
            lines.append(f"{what}  failed: {row['failed']}")
        else:
            lines.append(what + "".join(f"{_cell(row[column]):>23}" for column in COLUMNS))
    return "\n".join(lines)


def _cell(figure: Mapping[str, float | None]) -> str:
    median, least, most = (_figure(cast(float, figure[n])) for n in ("median", "min", "max"))
    ratio = "" if figure["ratio"] is None else f" x{figure['ratio']:.2f}"
    return f"{median} ({least}-{most}){ratio}"


def _figure(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
