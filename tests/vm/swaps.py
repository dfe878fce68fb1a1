"""`make swaps`: cards changed quickly under a mounted filesystem; is anything of one on the next?

The next card is mounted read-only by its rule, so that its image must stay as it was, byte by byte.
What the kernel has sent to the reader is traced, and told apart by two of its own events: that the
card was changed, and that the mapping has another table.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from vm import installed, machine, media
from vm.guest import Guest, SdCard

POINT: Final = "/run/media/cartridge-01"
NEXT_POINT: Final = "/run/media/cartridge-02"
RULES: Final = """
[[rule]]
name = "compared"
match.partlabel = "cartridge-02"
mount.read_only = true
[[rule]]
name = "others"
match.partlabel = "cartridge-*"
"""
MONITOR: Final = "/var/tmp/monitor"
TRACE: Final = "/sys/kernel/tracing"
PREPARE: Final = f"""
    cp /data/caam/cartridge-01.bb /data/caam/cartridge-02.bb
    mountpoint -q {TRACE} || mount -t tracefs tracefs {TRACE}
    echo mono > {TRACE}/trace_clock
    echo 'rwbs ~ "*W*"' > {TRACE}/events/block/block_rq_issue/filter
    echo 1 > {TRACE}/events/block/block_rq_issue/enable
    udevadm monitor --kernel --subsystem-match=block >{MONITOR} 2>&1 &
"""
END: Final = f"""
    pkill -x udevadm; rm {MONITOR}
    echo 0 > {TRACE}/events/block/block_rq_issue/enable; echo local > {TRACE}/trace_clock
"""
WRITER: Final = f"""
import os
file = os.open("{POINT}/growing", os.O_RDWR | os.O_CREAT)
block = os.urandom(65536)
while True:
    for number in range(48):
        os.pwrite(file, block, number * 65536)
"""
LOADS: Final = {
    "dirty": f"head -c 3M /dev/urandom > {POINT}/dirty",
    "dirty and open": f"(head -c 3M /dev/urandom; sleep 600) > {POINT}/open 2>/dev/null & "
    f"until [ $(stat -c %s {POINT}/open) = 3145728 ]; do :; done",
    "written without a pause": "echo 10 > /proc/sys/vm/dirty_writeback_centisecs; "
    "echo 10 > /proc/sys/vm/dirty_expire_centisecs; "
    f"python3 -c '{WRITER}' >/dev/null 2>&1 & "
    f"until [ -s {POINT}/growing ]; do :; done",
    "clean": "",
}
"""What is done to the first card, by its words."""
CALM: Final = """
    pkill -f '[/]growing' || true; pkill -x sleep || true
    echo 500 > /proc/sys/vm/dirty_writeback_centisecs
    echo 3000 > /proc/sys/vm/dirty_expire_centisecs
"""
DELAY_S: Final = 0.7
SERVED_WITHIN_S: Final = 180
"""An emulated slot whose card goes amid a transfer may not say so. The kernel waits 10 s for the
end of each command then, and reports the departure after several.
"""
Socket = Literal["reader", "slot"]
_EVENT: Final = re.compile(r"KERNEL\[([\d.]+)\] (\w+) +\S*/block/(\S+) \(block\)")
_WRITE: Final = re.compile(r" ([\d.]+): block_rq_issue: (\d+),\d+ \w+ \d+ \(\) (\d+) \+ (\d+)")
_MAJOR: Final = {"reader": "8", "slot": "179"}
_DISK: Final = {"reader": re.compile(r"sd[a-z]$"), "slot": re.compile(r"mmcblk\d+p1$")}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one change of cards has led to."""

    window_s: float
    """From the kernel's event to the error table; -1 without an error table."""
    foreign: int
    """Sectors of the next card that are not as they were."""
    before: int
    """Sectors sent before the kernel's event, also to the first card as long as it was in."""
    within: int
    """Sectors sent within the window."""
    after: int
    """Sectors sent after the window."""
    is_served: bool
    """Whether the next card was mounted without anybody's help."""

    @property
    def is_right(self) -> bool:
        """Whether the next card is served, and has no more foreign sectors than were sent early.

        The kernel's event is read a little after it was sent, so a write in the window may count as
        one before.
        """
        return self.is_served and not self.after and self.foreign <= self.before + self.within


@dataclass
class Figures:
    """Outcomes by socket and load."""

    outcomes: dict[tuple[Socket, str], list[Outcome]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def lines(self) -> Iterator[str]:
        """Yield a line for each kind of change, and one for all windows."""
        for (socket, load), found in self.outcomes.items():
            foreign = [each.foreign for each in found]
            yield (
                f"{socket}, {load}: {len(found)} changes, {sum(foreign)} foreign sectors in "
                f"{sum(map(bool, foreign))} of them; sent before the kernel's event "
                f"{sum(each.before for each in found)}, in the window "
                f"{sum(each.within for each in found)}, after it "
                f"{sum(each.after for each in found)}; served by itself "
                f"{sum(each.is_served for each in found)}"
            )
        for socket in dict.fromkeys(socket for socket, _ in self.outcomes):
            windows = [
                each.window_s * 1000
                for (where, _), found in self.outcomes.items()
                for each in found
                if where == socket and each.window_s >= 0
            ]
            if windows:
                yield (
                    f"{socket}: kernel's event to error table: median "
                    f"{statistics.median(windows):.1f} ms, at most {max(windows):.1f} ms "
                    f"(n = {len(windows)})"
                )


class Swaps:
    """Two cards, changed again and again in a reader or in the slot."""

    def __init__(self, guest: Guest, folder: Path, seed: int) -> None:
        self._guest = guest
        self._random = random.Random(seed)
        self._first = media.make_medium(folder / "first.img", "cartridge-01", total_mib=64)
        self._next = media.make_medium(folder / "next.img", "cartridge-02", total_mib=64)
        self._whole = self._next.read_bytes()
        self.figures = Figures()

    async def prepare(self, agent: installed.InstalledAgent) -> None:
        """The agent serves both cards, and what the kernel does is recorded."""
        await agent.configure(RULES)
        await self._guest.sh(PREPARE)
        self._reader = await self._guest.plug_reader(self._first)
        self._nodes = self._reader.socket.node, await self._guest.open_card(self._next)
        await self._reader.remove()
        await self._guest.find_slot()
        await agent.start()

    async def end(self) -> None:
        """Nothing is recorded any more."""
        await self._guest.sh(END)

    async def change(self, socket: Socket, load: str) -> Outcome:
        """The first card is mounted and has its load; then it is changed, and all is counted."""
        guest = self._guest
        delay_s = self._random.uniform(0, DELAY_S)
        await self._put_in(socket, self._nodes[0])
        await guest.until_mounted(POINT)
        await guest.sh("udevadm settle; sync")
        await guest.sh(LOADS[load])
        await guest.sh(f"echo > {TRACE}/trace; truncate -s 0 {MONITOR}")
        begun = float((await guest.sh("cut -d' ' -f1 /proc/uptime")).stdout)
        await asyncio.sleep(self._random.uniform(0, DELAY_S))
        await self._take_out(socket)
        await asyncio.sleep(delay_s)
        await self._put_in(socket, self._nodes[1])
        is_served = await self._is_served()
        outcome = await self._outcome(socket, begun, is_served=is_served)
        self.figures.outcomes[socket, load].append(outcome)
        await guest.sh(CALM)
        await self._take_out(socket)
        await guest.until("! ls /sys/class/block | grep -qE '^(sd.|mmcblk.p)1'")
        await guest.until("[ $(dmsetup ls | grep -c caam-) = 0 ]")
        self._next.write_bytes(self._whole)
        return outcome

    async def _is_served(self) -> bool:
        try:
            await self._guest.until_mounted(NEXT_POINT, deadline_s=SERVED_WITHIN_S)
        except AssertionError:
            await self._guest.sh("for disk in /dev/sd?; do : < $disk || true; done")
            return False
        return True

    async def _outcome(self, socket: Socket, begun: float, *, is_served: bool) -> Outcome:
        now = self._next.read_bytes()
        foreign = sum(
            now[at : at + media.SECTOR] != self._whole[at : at + media.SECTOR]
            for at in range(0, len(now), media.SECTOR)
        )
        events = _EVENT.findall((await self._guest.read(MONITOR)).decode(errors="replace"))
        changed = next((float(at) for at, _, name in events if _DISK[socket].match(name)), begun)
        tables = (
            float(at)
            for at, action, name in events
            if action == "change" and name.startswith("dm-") and float(at) >= changed
        )
        table = next(tables, None)
        trace = (await self._guest.read(f"{TRACE}/trace")).decode()
        sent: dict[str, int] = defaultdict(int)
        for at, major, _, count in _WRITE.findall(trace):
            if major == _MAJOR[socket] and float(at) >= begun:
                is_late = table is None or float(at) > table
                sent["before" if float(at) < changed else "after" if is_late else "within"] += int(
                    count
                )
        window = -1.0 if table is None else table - changed
        return Outcome(window, foreign, sent["before"], sent["within"], sent["after"], is_served)

    async def _put_in(self, socket: Socket, node: str) -> None:
        if socket == "reader":
            await self._reader.insert(node)
        else:
            self._card = SdCard(self._guest, node)
            await self._card.plug()

    async def _take_out(self, socket: Socket) -> None:
        if socket == "reader":
            await self._reader.remove()
        else:
            await self._card.pull()


async def swaps(*options: str) -> int:
    """Change cards in a new guest, and print figures. Returns: 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="swaps")
    parser.add_argument("--changes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**8)
    asked = parser.parse_args(options)
    kinds: list[tuple[Socket, str]] = [
        (socket, load) for load in LOADS for socket in ("reader", "reader", "slot")
    ]
    print(f"seed {asked.seed}", flush=True)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        async with machine.restored(installed.layer()) as guest:
            work = Swaps(guest, Path(folder), asked.seed)
            await work.prepare(installed.InstalledAgent(guest))
            for number in range(asked.changes):
                socket, load = kinds[number % len(kinds)]
                outcome = await work.change(socket, load)
                wrong += not outcome.is_right
                print(
                    f"change {number + 1} of {asked.changes}: {socket}, {load}: {outcome}",
                    flush=True,
                )
    for line in work.figures.lines():
        print(line)
    return 1 if wrong else 0
