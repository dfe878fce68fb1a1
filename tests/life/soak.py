"""Media come and go for a long time while everything fails, and nothing grows.

    PYTHONPATH=agent:tests .venv/bin/python -m life.soak --cycles 100000 --seed 1

A cycle is one volume plugged and pulled. Around the cycles, in an order that the seed decides,
steps fail, hang and answer late, processes hold mounts, events are lost, the agent crashes, stops
and starts. Every 1,000 cycles, when all media are out, nothing may be left: no key, mapping, mount
or directory, no entry in a table of the agent's, no task, thread or file descriptor, and no memory.
The last hundredth of the cycles has its calls in threads, as the agent has them.
"""

from __future__ import annotations

import argparse
import errno
import gc
import logging
import os
import random
import sys
import threading
import time
from collections.abc import Callable

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnStop, Rule
from caam_hotplug.config.templates import PathTemplate
from caam_hotplug.errors import DmError, HotplugError, KernelError, MountError
from caam_hotplug.model import State
from fakes.bench import Bench
from fakes.kernel import Fault

NAMES = ("sda1", "sdb1", "sdc1", "sdd1")
LABELS = ("cartridge-01", "cartridge-02", "keep-01", "raw-01", "path-01", "../../etc")
RULES = (
    Rule(name="keep", on_stop=OnStop.KEEP, match=Match(partlabel="keep-*")),
    Rule(name="raw", action=Action.UNLOCK, match=Match(partlabel="raw-*")),
    Rule(
        name="path",
        match=Match(partlabel="path-*"),
        mount=MountSettings(path=PathTemplate("/srv/{partlabel}")),
    ),
    *BUILT_IN,
)
STEPS = (
    "identify", "read_blob", "import_blob", "add_key", "unlink_key", "find_mapping",
    "create_mapping", "load_table", "activate_mapping", "load_error_table", "remove_mapping",
    "keep_mapping", "probe", "mount", "flush", "unmount", "detach", "remove_mount_point",
    "our_mappings", "our_mount_points",
)  # fmt: skip
ERRORS: tuple[Callable[[str], HotplugError], ...] = (
    lambda step: KernelError(step, "x", errno.EIO),
    lambda step: MountError(step, "x", errno.EIO),
    lambda step: DmError(step, "x", errno.ENOMEM),
)
CHECK_EVERY = 1000
GROWTH_MAX_KIB = 1024
GROWTH_MAX_BLOCKS = 2000
"""Growth of Python's own memory, which does not count pages that are only touched."""


class LeakError(AssertionError):
    """Something has grown that must not grow."""


def resident_kib() -> int:
    """Return the resident memory of this process."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024


def process_resources() -> dict[str, int]:
    """Count the open files and threads of this process."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread():
            thread.join(60)  # its call is answered; it only has to end
    return {"threads": threading.active_count(), "fds": len(os.listdir("/proc/self/fd"))}


class Soak:
    """A bench with random events and faults."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._bench: Bench
        self.cycles = 0
        self.crashes = 0
        self.faults = 0

    def run(self, cycles: int, *, threads: bool, report: Callable[[], None]) -> None:
        """Run this many more cycles. Raises: LeakError; AssertionError."""
        self._bench = Bench(RULES, threads=threads)
        self._bench.start()
        end = self.cycles + cycles
        self._check()
        before = process_resources()
        while self.cycles < end:
            next_check = min(end, self.cycles + CHECK_EVERY)
            while self.cycles < next_check:
                self._random_event()
            self._check()
            if (now := process_resources()) != before:
                raise LeakError(f"{before} has become {now}")
            report()
        self._bench.stop()
        self._bench.close()

    def _random_event(self) -> None:
        bench, chance = self._bench, self._chance
        act = chance.choices(
            (
                self._plug_or_pull,
                self._pass_time,
                self._add_fault,
                self._use_mounts,
                self._restart,
            ),
            (50, 30, 12, 6, 2),
        )[0]
        act()
        if bench.has_failed:  # without a list of its mappings it does not start
            bench.take_error()
            bench.start()
        bench.kernel.steps.clear()
        bench.kernel.subjects.clear()
        bench.states.clear()

    def _plug_or_pull(self) -> None:
        bench, chance = self._bench, self._chance
        name, is_reported = chance.choice(NAMES), chance.random() > 0.02
        if name in bench.kernel.media:
            (bench if is_reported else bench.kernel).pull(name)
            self.cycles += 1
        else:
            (bench if is_reported else bench.kernel).insert(
                chance.choice(LABELS),
                name,
                read_only=chance.random() < 0.1,
                identified=chance.random() > 0.1,
            )

    def _pass_time(self) -> None:
        match self._chance.randrange(4):
            case 0:
                self._bench.run_turns(self._chance.randrange(1, 40))
            case 1:
                self._bench.wait(self._chance.choice((0.1, 2.0, 30.0)))
            case _:
                self._bench.settle()

    def _add_fault(self) -> None:
        chance, faults = self._chance, self._bench.kernel.faults
        if len(faults) > 3:
            faults.clear()  # no call takes their steps
        step = chance.choice(STEPS)
        if chance.random() < 0.5:
            fault = Fault(step, chance.choice(ERRORS)(step))
        else:
            acts_first = chance.random() < 0.5
            fault = Fault(step, hangs_s=chance.choice((1.0, 5.0, 60.0)), acts_first=acts_first)
        fault.after = chance.randrange(3)
        faults.append(fault)

    def _use_mounts(self) -> None:
        bench = self._bench
        match self._chance.randrange(4):
            case 0:
                for mount in bench.kernel.mounts:
                    bench.kernel.users[mount.point.rsplit("/", 1)[1]] = 1
            case 1:
                bench.kernel.close_holders()
            case 2 if bench.kernel.media:
                bench.appear(self._chance.choice(list(bench.kernel.media.values())).volume)
            case _:
                bench.lose_events()

    def _restart(self) -> None:
        bench = self._bench
        if self._chance.random() < 0.6:
            bench.kill()
            self.crashes += 1
        else:
            bench.wait(100)  # a stop waits for all hanging calls
            if bench.has_failed:
                bench.take_error()
            else:
                bench.stop()
        bench.start()

    def _check(self) -> None:
        """Pull all media, end all faults, and check that nothing is left. Raises: LeakError."""
        bench = self._bench
        bench.kernel.faults.clear()
        bench.wait(1000)
        bench.lose_events()  # so that it learns of all unreported events
        bench.settle()
        self._check_published_states()
        for name in list(bench.kernel.media):
            bench.pull(name)
        bench.settle()
        for name, count in bench.table_sizes().items():
            if count != (1 if name == "tasks" else 0):
                raise LeakError(f"{name}: {count}")
        if any(entry.state is not State.REMOVED_UNSAFELY for entry in bench.registry.entries()):
            raise LeakError(f"published: {bench.registry.entries()}")
        bench.kernel.close_holders()
        bench.stop()
        bench.start()  # the next start releases the leftovers of a failed release
        bench.settle()
        self.faults += bench.kernel.faulted_calls
        bench.kernel.faulted_calls = 0
        if left := bench.kernel.leftovers():
            raise LeakError(f"leftovers: {left}")

    def _check_published_states(self) -> None:
        points = {mount.point for mount in self._bench.kernel.mounts}
        for entry in self._bench.registry.entries():
            if entry.state is State.MOUNTED and entry.reason.split()[1].rstrip(",") not in points:
                raise LeakError(f"not mounted: {entry}")
            if entry.state is State.STUCK:
                raise LeakError(f"nothing hangs: {entry}")


def soak(cycles: int, seed: int, report: Callable[[str], None]) -> str:
    """Run all cycles; return the figures in a line. Raises: LeakError."""
    logging.getLogger("caam_hotplug").setLevel(logging.CRITICAL)
    running, started = Soak(seed), time.monotonic()
    warm: tuple[int, int] | None = None
    in_threads = cycles // 100

    def progress() -> None:
        nonlocal warm
        if warm is None and running.cycles >= min(5 * CHECK_EVERY, cycles // 2):
            warm = resident_kib(), sys.getallocatedblocks()
        report(f"{running.cycles} of {cycles} cycles, {running.faults} faults")

    running.run(cycles - in_threads, threads=False, report=progress)
    assert warm is not None
    grown_kib, grown_blocks = resident_kib() - warm[0], sys.getallocatedblocks() - warm[1]
    running.run(in_threads, threads=True, report=progress)
    seconds = time.monotonic() - started
    if grown_kib >= GROWTH_MAX_KIB or grown_blocks >= GROWTH_MAX_BLOCKS:
        raise LeakError(f"memory has grown by {grown_kib} KiB, {grown_blocks} blocks of Python's")
    return (
        f"{running.cycles} cycles (the last {in_threads} in threads), seed {seed}, "
        f"{running.faults} faults, {running.crashes} crashes, {seconds:.0f} s, "
        f"memory grew by {grown_kib} KiB "
        f"({grown_blocks} blocks of Python's), leaks 0"
    )


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="life.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)

    def report(words: str) -> None:
        if sys.stdout.isatty():
            print(f"\r{words}", end="", flush=True)

    line = soak(arguments.cycles, arguments.seed, report)
    print(f"\r{line}" if sys.stdout.isatty() else line)


if __name__ == "__main__":
    main()
