"""Media plugged and pulled for hours with random faults, and figures of what is left.

    python3 -m kernel.soak --cycles 1000 --damaged 200 --storms 10 --timings 12 --seed 7

Runs in the guest, as root; `make soak` starts it there. Everything random comes from the seed. It
ends at the first wrong outcome, with its cycle and the agent's log.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final
from unittest import mock

from caam_hotplug.daemon import main as daemon
from fakes.contract import until
from kernel import latencies
from kernel.agents import ROOM, Room, keys, mappings, room_of
from kernel.cartridges import KEY, Cartridge, cartridges
from kernel.forked import Stop, kill_self
from kernel.latencies import formatted
from kernel.storms import log_shown_on_failure, storms
from kernel.witness import RESTING, crypt, run

FILESYSTEMS: Final = {
    "cartridge-01": ("mkfs.ext4", "-q"),
    "cartridge-02": ("mkfs.vfat",),
    "cartridge-03": ("mkfs.ext4", "-q", "-O", "^has_journal"),
    "cartridge-04": ("mkfs.exfat",),
}
CALLS_OF_AN_ARRIVAL: Final = 10
"""Lower bound for the calls of an arrival with any filesystem."""
WARM_UP: Final = 5
"""Cycles before the agent's size is read first."""
MEMORY_WARMS_UP: Final = 100
"""Cycles, or a tenth of all if that is less, until it has had its largest load. Python and libc
keep the memory of that moment.
"""
SUPERBLOCK: Final = {"ext4": range(1024, 2048), "vfat": range(11, 40)}
"""Which bytes; for vfat, those of the boot sector's parameter block."""
BEHIND_IT: Final = 8192
"""Bytes from the start that contain the structures the superblock points to."""
RSS_GROWTH_KIB: Final = 2048
"""For an agent that is a copy of this process with all its memory, and takes more a MiB at a time.
kernel.growth measures how much the service itself grows.
"""
SECTOR: Final = 512
STORM: Final = 64
"""Media in a storm."""


@dataclass
class Figures:
    """Figures of a soak."""

    seed: int
    cycles: int = 0
    seconds: float = 0.0
    actions: Counter[str] = field(default_factory=Counter)
    files_checked: int = 0
    rss_growth_kib: int = 0
    """Largest growth of one agent process after its warm-up."""
    damaged: Counter[str] = field(default_factory=Counter)
    """Damaged filesystems, by kind and outcome."""
    storms_s: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of each storm until all media were mounted, and until all were gone."""


@dataclass(frozen=True, slots=True)
class Size:
    """Resources of an agent's process, and the kernel's resources for it."""

    files: int
    threads: int
    keys: int
    semaphores: int
    rss_kib: int

    def exceeds(self, other: Size) -> bool:
        """Whether anything but memory is larger than in the other."""
        return (
            self.files > other.files
            or self.threads > other.threads
            or self.keys > other.keys
            or self.semaphores > other.semaphores
        )


def size_of(pid: int) -> Size:
    """Measure the process now."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in status)
    return Size(
        files=len(list(Path(f"/proc/{pid}/fd").iterdir())),
        threads=int(values["Threads"]),
        keys=_used_keys(),
        semaphores=len(Path("/proc/sysvipc/sem").read_text().splitlines()),
        rss_kib=int(values["RssAnon"].split()[0]),
    )


def _used_keys() -> int:
    """Count root's keys, from proc_key-users(5): `0: USAGE NKEYS/NIKEYS QNKEYS/MAX QNBYTES/MAX`."""
    (root,) = [
        line for line in Path("/proc/key-users").read_text().splitlines() if line.split()[0] == "0:"
    ]
    return int(root.split()[2].split("/")[0])


class Soak:
    """A soak: a room, and random actions in it."""

    def __init__(self, room: Room, figures: Figures, say: Callable[[str], None]) -> None:
        self._room = room
        self._figures = figures
        self._say = say
        self._random = random.Random(figures.seed)
        self._files: dict[str, tuple[str, str]] = {}
        """For each medium, a file that is certainly on it, and its digest."""
        self._first: Size | None = None
        self._age = 0
        self._memory_from = WARM_UP

    def cycles(self, count: int) -> None:
        """Plug and pull media this many times. Raises: AssertionError."""
        begun = time.monotonic()
        self._memory_from = max(WARM_UP, min(MEMORY_WARMS_UP, count // 10))
        self._start()
        actions = [
            self._in_order, self._in_order, self._pulled_at_a_call, self._held_open,
            self._without_blob, self._foreign_blob, self._all_at_once,
            self._stopped, self._killed_at_a_call,
        ]  # fmt: skip
        for number in range(count):
            if number == count // 2:  # from here on one agent serves, whose growth is checked
                actions = [a for a in actions if a not in (self._killed_at_a_call, self._stopped)]
            action = self._random.choice(actions)
            medium = self._random.choice(self._room.media)
            self._room.agent.forget()
            self._figures.actions[action.__name__.strip("_")] += 1
            action(medium)
            self._figures.cycles += 1
            self._figures.seconds = round(time.monotonic() - begun, 1)
            self._check()
            self._say(f"cycle {number + 1} of {count}: {action.__name__.strip('_')} {medium.label}")
        self._room.agent.stop()

    def damaged(self, count: int, medium: Cartridge, kind: str) -> None:
        """Plug this many filesystems with random damage. Raises: AssertionError."""
        self._start()
        for number in range(count):
            self._room.agent.forget()
            with self._room.agent.suspended():
                damage(medium, self._random, SUPERBLOCK[kind])
            medium.plug()
            line = self._room.agent.until_said(f"{medium.label}.*: (mounted|failed): ")
            outcome = "mounted" if ": mounted: " in line else "failed"
            self._figures.damaged[f"{kind} {outcome}"] += 1
            medium.pull()
            self._gone(medium)
            self._check()
            self._say(f"damaged {kind} {number + 1} of {count}: {line}")
        self._room.agent.stop()
        with medium.disposable():
            pass

    def _start(self, stop: Stop | None = None) -> None:
        self._room.agent.start(stop)
        self._first, self._age = None, 0

    def _check(self) -> None:
        """Check that nothing is left without a medium, and that the agent has not grown."""
        self._age += 1
        assert mappings() == []
        until(lambda: keys() == [])
        assert list(self._room.mount_root.iterdir()) == []
        if self._age < WARM_UP:
            return
        pid = self._room.agent.pid
        if self._first is None:
            self._between_calls()
            self._first = size_of(pid)
        first = self._first
        now = size_of(pid)

        def has_settled() -> bool:
            nonlocal now
            now = size_of(pid)
            return not now.exceeds(first)

        with suppress(AssertionError):  # an unlinked or ended resource counts a little longer
            until(has_settled)
        assert not now.exceeds(first), f"{first} became {now}"
        if self._age == self._memory_from:
            self._first = replace(first, rss_kib=now.rss_kib)
            return
        grown = now.rss_kib - first.rss_kib
        if self._age > self._memory_from:
            self._figures.rss_growth_kib = max(self._figures.rss_growth_kib, grown)
            assert grown < RSS_GROWTH_KIB, f"{first} became {now}"

    def _between_calls(self) -> None:
        """Whether no call of the agent is running, and all that returned are recorded."""
        until(lambda: size_of(self._room.agent.pid).threads == RESTING)

    def _served(self, medium: Cartridge) -> Path:
        """Check that the medium is mounted and its file is complete."""
        self._room.agent.until_said(f"{medium.label}.*: mounted: at ")
        point = self._room.point(medium)
        if medium.label in self._files:
            name, digest = self._files[medium.label]
            assert hashlib.sha256((point / name).read_bytes()).hexdigest() == digest
            self._figures.files_checked += 1
        return point

    def _write(self, medium: Cartridge, point: Path, *, synced: bool) -> None:
        """Replace the medium's file by a file with random bytes."""
        data = self._random.randbytes(self._random.randrange(1, 100_000))
        name = f"file-{self._figures.cycles}"
        with (point / name).open("wb") as file:
            file.write(data)
            if synced:
                os.fsync(file)
        if medium.label in self._files:
            (point / self._files[medium.label][0]).unlink()
        if synced:
            os.sync()
        self._files[medium.label] = name, hashlib.sha256(data).hexdigest()

    def _gone(self, medium: Cartridge) -> None:
        until(lambda: not self._left(medium))

    def _left(self, medium: Cartridge) -> bool:
        names = [name for name in mappings() if f"caam-{medium.label}-" in name]
        return bool(names or keys() or self._room.point(medium).exists())

    def _in_order(self, medium: Cartridge) -> None:
        medium.plug()
        self._write(medium, self._served(medium), synced=True)
        medium.pull()
        self._gone(medium)

    def _stopped(self, medium: Cartridge) -> None:
        """Stop in order: unsynced writes are on the medium afterwards."""
        medium.plug()
        self._write(medium, self._served(medium), synced=False)
        self._room.agent.stop()
        medium.pull()
        self._start()

    def _pulled_at_a_call(self, medium: Cartridge) -> None:
        agent = self._room.agent
        self._between_calls()
        count = len(agent.calls) + self._random.randint(1, CALLS_OF_AN_ARRIVAL)
        medium.plug()
        agent.until_called(count)
        medium.pull()
        agent.until_said(f"{medium.label}.*: (gone|removed-unsafely)")
        self._gone(medium)

    def _killed_at_a_call(self, medium: Cartridge) -> None:
        self._room.agent.stop()
        self._start(Stop(self._random.randint(1, CALLS_OF_AN_ARRIVAL), kill_self))
        medium.plug()
        self._room.agent.until_killed()
        if self._random.random() < 0.5:
            medium.pull()
            self._start()
        else:
            self._start()
            self._served(medium)
            medium.pull()
        self._gone(medium)

    def _held_open(self, medium: Cartridge) -> None:
        medium.plug()
        point = self._served(medium)
        inside = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            medium.pull()
            self._room.agent.until_said(f"{medium.label}.*: removed-unsafely")
            medium.plug()
            self._served(medium)
        finally:
            os.close(inside)
        medium.pull()
        self._gone(medium)

    def _without_blob(self, medium: Cartridge) -> None:
        self._refused(medium, None, "waiting: no blob")

    def _foreign_blob(self, medium: Cartridge) -> None:
        flipped = bytearray(_blob(medium).read_bytes())
        flipped[self._random.randrange(20, len(flipped))] ^= 1 << self._random.randrange(8)
        self._refused(medium, bytes(flipped), "failed: the CAAM refused the blob")

    def _refused(self, medium: Cartridge, blob: bytes | None, words: str) -> None:
        """Check that the medium fails with these words, with this blob or without one."""
        file = _blob(medium)
        good = file.read_bytes()
        if blob is None:
            file.unlink()
        else:
            file.write_bytes(blob)
        try:
            medium.plug()
            self._room.agent.until_said(f"{medium.label}.*: {words}")
        finally:
            file.write_bytes(good)
        medium.pull()
        self._room.agent.until_said(f"{medium.label}.*: gone")
        self._gone(medium)

    def _all_at_once(self, medium: Cartridge) -> None:
        """Deliver all events at once to an agent that was suspended."""
        assert medium
        with self._room.agent.suspended():
            for each in self._room.media:
                each.plug()
        until(lambda: all(self._room.point(each).is_mount() for each in self._room.media))
        for each in self._room.media:
            each.pull()
        for each in self._room.media:
            self._gone(each)


def _blob(medium: Cartridge) -> Path:
    return ROOM / "blobs" / f"{medium.label}.bb"


def damage(medium: Cartridge, source: random.Random, superblock: Sequence[int]) -> None:
    """Restore the medium's filesystem, then damage a byte of its superblock and some more bytes."""
    medium.plug()
    medium.settle()
    medium.restore()
    with open(medium.partition, "r+b", buffering=0) as partition:
        others = [source.randrange(BEHIND_IT) for _ in range(source.randrange(16))]
        for at in (source.choice(superblock), *others):
            number, offset = divmod(at, SECTOR)
            iv = number.to_bytes(4, "little").ljust(16, b"\0")
            partition.seek(number * SECTOR)
            sealed = partition.read(SECTOR)
            sector = bytearray(crypt("cbc(aes)", KEY, sealed, decrypt=True, iv=iv))
            sector[offset] ^= source.randrange(1, 256)
            partition.seek(number * SECTOR)
            partition.write(crypt("cbc(aes)", KEY, bytes(sector), iv=iv))
        os.fsync(partition)
    medium.pull()


def soak(cycles: int, damaged: int, figures: Figures, say: Callable[[str], None]) -> None:
    """Run a soak from beginning to end, in a new room. Raises: AssertionError."""
    with (
        cartridges(list(FILESYSTEMS), list(FILESYSTEMS.values())) as media,
        room_of(media) as room,
        # A thread more then means a call that has not returned.
        mock.patch.object(daemon, "_IDLE_THREADS", 0),
    ):
        work = Soak(room, figures, say)
        with log_shown_on_failure(room, say):
            if cycles:
                work.cycles(cycles)
            if damaged:
                work.damaged(damaged, media[0], "ext4")
                work.damaged(damaged, media[1], "vfat")


def _time(count: int, say: Callable[[str], None]) -> None:
    """Print the latencies. Raises: AssertionError."""
    with cartridges(["cartridge-01", "cartridge-02"]) as media, room_of(media) as room:
        for holder, seconds in latencies.after_the_removal(room, count).items():
            say(f"no crypt table after the kernel's remove event ({holder}): {formatted(seconds)}")
        found = latencies.beside_a_hung_medium(room, max(1, count // 4))
        for when, seconds in found.items():
            say(f"plugged and mounted, {when}: {formatted(seconds)}")
        beside, without = map(statistics.median, found.values())
        say(f"ratio: {beside / without:.2f}")


def main() -> int:
    """Print a line per cycle, and the figures as JSON at the end. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cycles", type=int, default=1000)
    parser.add_argument("--damaged", type=int, default=200)
    parser.add_argument("--storms", type=int, default=10)
    parser.add_argument("--timings", type=int, default=12)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    options = parser.parse_args()
    run("modprobe", "-a", "vfat", "exfat")

    def say(line: str) -> None:
        print(line, flush=True)

    figures = Figures(options.seed)
    try:
        if options.cycles or options.damaged:
            soak(options.cycles, options.damaged, figures, say)
        if options.storms:
            figures.storms_s = storms(options.storms, STORM, say)
        if options.timings:
            _time(options.timings, say)
    finally:
        say(json.dumps(vars(figures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
