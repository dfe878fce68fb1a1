"""What users and programs do by hand to media, mappings, mounts and the agent, on a real kernel."""

from __future__ import annotations

import os
import random
import resource
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from fakes.contract import until
from fakes.oracle import SeenMapping
from kernel import seen
from kernel.agents import Room
from kernel.asked import Asked
from kernel.cartridges import Cartridge
from kernel.gadgets import Card, Reader
from kernel.seen import Disks
from kernel.witness import attempt, change_the_clock, run
from kernel.written import Written

ELSEWHERE: Final = ("/mnt", "/srv")
FLOOD: Final = 30
"""Requests at once; their answers fit into the socket, which nobody reads meanwhile."""
CUT_OFF_WITHIN_S: Final = 10.0
WEIGHTS: Final = {
    "plug": 9, "pull": 5, "swap": 9, "write": 14,
    "umount": 5, "umount_lazily": 3, "bind": 3, "cover": 3, "uncover": 4, "remount": 5,
    "suspend": 3, "resume": 4, "load": 3, "remove": 2,
    "hold": 4, "open_mapping": 3, "loop": 2, "end_uses": 5,
    "ask": 14, "flood": 2, "kill": 2, "stop": 1,
    "go_offline": 2, "come_back": 3, "stop_udevd": 2, "start_udevd": 3, "exhaust": 2, "relieve": 4,
    "sleep": 2,
}  # fmt: skip
"""How often each act is done."""


class ByHand:
    """Does one act at a time. Every choice comes from the act's own `chance`."""

    def __init__(
        self, room: Room, agent: Asked, disks: Disks, reader: Reader, written: Written
    ) -> None:
        self.starts_in = 0
        """Steps until an agent that has ended is started."""
        self._room = room
        self._agent = agent
        self._disks = disks
        self._reader = reader
        self._written = written
        self.is_udevd_stopped = False
        self.is_exhausted = False
        """Whether the agent can open no more files, so that it may know nothing."""
        self._count = 0
        """Files that were written, or were to be."""
        self._without_card: list[str] = []
        """Mappings whose card was taken out."""
        self._limit = (0, 0)
        """How many files the agent may open else."""
        self._held: list[subprocess.Popen[bytes]] = []
        self._loops: list[str] = []

    # What there is.

    def _mappings(self) -> list[SeenMapping]:
        return sorted(seen.mappings(), key=lambda mapping: mapping.name)

    def _mapping(self, chance: random.Random) -> SeenMapping | None:
        found = self._mappings()
        return chance.choice(found) if found else None

    def _points(self) -> list[str]:
        """Return where something of the agent's is mounted that answers."""
        usable = {m.number for m in self._mappings() if not m.is_suspended}
        mounts = seen.lines()
        return sorted(
            m.point
            for m in mounts
            if m.number in usable and seen.seen_at(m.point, mounts) == m.identity
        )

    def _point(self, chance: random.Random) -> str | None:
        found = self._points()
        return chance.choice(found) if found else None

    def _point_to_flush(self, chance: random.Random) -> str | None:
        """As `_point`; None while a changed card might get what is flushed for the one before.

        Between the kernel's event and the error table nothing keeps a flush by hand from it.
        """
        return self._point(chance) if self._is_cut_off() else None

    def _is_cut_off(self) -> bool:
        """Wait for the agent to cut off what leads to a card that was changed.

        Return whether it has: at its limit of open files, it may not know.
        """
        without = set(self._without_card)
        with suppress(AssertionError):
            until(
                lambda: not any(m.name in without and m.leads_to for m in self._mappings()),
                within_s=CUT_OFF_WITHIN_S,
            )
            self._without_card.clear()
            return True
        return False

    # Media.

    def plug(self, chance: random.Random) -> None:
        if out := [medium for medium in self._room.media if not medium.is_plugged]:
            chance.choice(out).plug()

    def pull(self, chance: random.Random) -> None:
        if there := [medium for medium in self._room.media if medium.is_plugged]:
            with suppress(OSError, ValueError):  # the agent has ejected it meanwhile
                chance.choice(there).pull()

    def swap(self, chance: random.Random) -> None:
        """Take the reader's card out, if one is in, and mostly put one in at once.

        Not under a mapping while no agent runs: nobody would keep its writes from the next card.
        """
        used = [m.name for m in self._mappings() if m.leads_to in self._disks.note_card().values()]
        if used and not self._room.agent.pid:
            return
        self._without_card += used
        if self._reader.card is not None:
            self._leave_dirty(self._reader.card)
        self._reader.take_out()
        if chance.random() < 0.8:
            self._reader.put_in(chance.choice(self._reader.cards))

    def _leave_dirty(self, card: Card) -> None:
        point = f"{self._room.mount_root}/{card.label}"
        if point in self._points():
            with suppress(OSError), open(f"{point}/dirty", "wb") as file:
                file.write(bytes(100_000))

    def write(self, chance: random.Random) -> None:
        if (point := self._point_to_flush(chance)) is not None:
            content = chance.randbytes(chance.randrange(1, 20_000))
            self.write_at(point, content, is_synced=chance.random() < 0.7)

    def write_at(self, point: str, content: bytes, *, is_synced: bool) -> None:
        """Write a new file; if it is synced, expect it on its medium."""
        self._count += 1
        name = f"file-{self._count:04}"
        with suppress(OSError):
            with open(f"{point}/{name}", "xb") as file:
                file.write(content)
                file.flush()
                if is_synced:
                    os.fsync(file)
            if is_synced:
                folder = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
                if label := self._label_of(point):  # still, so it is its card that has it
                    self._written.expect(label, name, content)

    def _label_of(self, point: str) -> str:
        """Return the label of the medium that is mounted there; empty if no table leads to one."""
        mounts = seen.lines()
        identity = seen.seen_at(point, mounts)
        numbers = {mount.number for mount in mounts if mount.identity == identity}
        return self._disks.label_below([m for m in self._mappings() if m.number in numbers])

    def umount(self, chance: random.Random) -> None:
        if (point := self._point_to_flush(chance)) is not None:
            attempt("umount", point)

    def umount_lazily(self, chance: random.Random) -> None:
        if (point := self._point_to_flush(chance)) is not None:
            attempt("umount", "-l", point)

    def bind(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("mount", "--bind", point, chance.choice((*ELSEWHERE, point)))

    def cover(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("mount", "-t", "tmpfs", "-o", "mode=0755", "others", point)

    def uncover(self, chance: random.Random) -> None:
        """Unmount one of the mounts that were made by hand."""
        found = self.mounts_by_hand()
        if found:
            attempt("umount", chance.choice(found))

    def mounts_by_hand(self) -> list[str]:
        """Return where something is mounted that is not the agent's, the topmost last.

        Not of a suspended mapping: the unmount would wait, and nothing ends that.
        """
        suspended = {mapping.number for mapping in self._mappings() if mapping.is_suspended}
        return [
            mount.point
            for mount in seen.lines()
            if mount.number not in suspended
            and (
                mount.point in ELSEWHERE
                or (
                    mount.filesystem == "tmpfs"
                    and mount.point.startswith(f"{self._room.mount_root}/")
                )
            )
        ]

    def remount(self, chance: random.Random) -> None:
        """Not read-write where nobody may write: a filesystem notes that on its medium."""
        if (point := self._point_to_flush(chance)) is not None:
            options = ["remount", chance.choice(("ro", "rw")), *chance.choice(([], ["bind"]))]
            is_writing = options == ["remount", "rw"]
            if not is_writing or self._written.may_be_written(self._label_of(point)):
                attempt("mount", "-o", ",".join(options), point)

    def suspend(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            _dmsetup("suspend", "--noflush", "--nolockfs", mapping.name)

    def resume(self, _chance: random.Random) -> None:
        for mapping in self._mappings():
            if mapping.is_suspended:
                _dmsetup("resume", mapping.name)

    def load(self, chance: random.Random) -> None:
        mapping = self._mapping(chance)
        if mapping is None or not mapping.table:
            return
        size = mapping.table.split()[1]
        _dmsetup("suspend", "--noflush", "--nolockfs", mapping.name)
        target = chance.choice(("error", "zero"))
        _dmsetup("reload", mapping.name, "--table", f"0 {size} {target}")
        if chance.random() < 0.7:
            _dmsetup("resume", mapping.name)

    def remove(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None and not mapping.is_suspended:
            force = ["-f"] if chance.random() < 0.5 else []
            _dmsetup("remove", *force, mapping.name)

    def hold(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            self._hold(f"{point}/hello.txt")

    def open_mapping(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self._hold(f"/dev/{_dm(mapping)}")

    def loop(self, chance: random.Random) -> None:
        """Put a loop device on a mapping; not on a suspended one: udevd would wait for a read."""
        if (mapping := self._mapping(chance)) is not None and not mapping.is_suspended:
            made = attempt("losetup", "-r", "-f", "--show", f"/dev/{_dm(mapping)}")
            self._loops += made.stdout.split()

    def _hold(self, path: str) -> None:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            self._held.append(subprocess.Popen(["sleep", "infinity"], stdin=file))

    def end_uses(self, _chance: random.Random) -> None:
        while self._held:
            process = self._held.pop()
            process.kill()
            process.wait()
        while self._loops:
            attempt("losetup", "-d", self._loops.pop())

    def sleep(self, _chance: random.Random) -> None:
        """Have the machine look as if it had slept: the clock is set."""
        change_the_clock()

    def ask(self, chance: random.Random) -> None:
        if not self._room.agent.pid:
            return
        claims = self._agent.claims(look=False)
        verb = chance.choice(("lock", "unlock", "eject", "eject", "retry"))
        if claims:
            self._agent.request(verb, chance.choice(claims).volume)

    def flood(self, chance: random.Random) -> None:
        """Send many requests at once."""
        if not self._room.agent.pid:
            return
        volumes = [claim.volume for claim in self._agent.claims(look=False)]
        verbs = ("look", "lock", "unlock", "eject", "retry")
        self._agent.requests(
            [(chance.choice(verbs), chance.choice(volumes)) for _ in range(FLOOD) if volumes]
        )

    def stop_udevd(self, _chance: random.Random) -> None:
        """Have udevd take events and not act on them."""
        if not self.is_udevd_stopped:
            run("udevadm", "control", "--stop-exec-queue")
            self.is_udevd_stopped = True

    def start_udevd(self, _chance: random.Random) -> None:
        if self.is_udevd_stopped:
            run("udevadm", "control", "--start-exec-queue")
            self.is_udevd_stopped = False

    def exhaust(self, chance: random.Random) -> None:
        """Let the agent open at most a few files more."""
        if (pid := self._room.agent.pid) and not self.is_exhausted:
            few = len(os.listdir(f"/proc/{pid}/fd")) + chance.randrange(4)
            self._limit = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (few, self._limit[1]))
            self.is_exhausted = True

    def relieve(self, _chance: random.Random) -> None:
        if self.is_exhausted and (pid := self._room.agent.pid):
            resource.prlimit(pid, resource.RLIMIT_NOFILE, self._limit)
        self.is_exhausted = False

    def settle(self) -> None:
        """Wait until udevd has acted on all events, if it does."""
        if not self.is_udevd_stopped:
            run("udevadm", "settle")

    def kill(self, chance: random.Random) -> None:
        self._end(chance, self._room.agent.kill)

    def stop(self, chance: random.Random) -> None:
        self._end(chance, self._room.agent.stop)

    def _end(self, chance: random.Random, end: Callable[[], object]) -> None:
        """End the agent, but not while a changed card is for it to keep from others' writes."""
        if not self._room.agent.pid or not self._is_cut_off():
            return
        if any(claim.state == "stuck" for claim in self._agent.claims(look=False)):
            self.resume(chance)  # a call of the agent waits for it, and nothing ends that
        end()
        self.is_exhausted = False
        self.starts_in = chance.randrange(1, 6)

    def start(self, _chance: random.Random) -> None:
        if not self._room.agent.pid:
            self._agent.start()

    def go_offline(self, chance: random.Random) -> None:
        medium = chance.choice(self._room.media)
        self._disks.volumes_of(medium)  # it gets another number, and is published under this one
        self._set_state(medium, "offline")

    def come_back(self, _chance: random.Random) -> None:
        for medium in self._room.media:
            self._set_state(medium, "running")

    def _set_state(self, medium: Cartridge, state: str) -> None:
        with suppress(OSError, ValueError):  # it is out, or being removed
            file = medium.disk / "device/state"
            if file.read_text().strip() != state:
                file.write_text(f"{state}\n")


def _dm(mapping: SeenMapping) -> str:
    """Return the kernel's name of the mapping's device."""
    return f"dm-{mapping.number.partition(':')[2]}"


def _dmsetup(*words: str) -> None:
    """Run dmsetup, which is not to wait for a udevd that is stopped."""
    attempt("dmsetup", "--noudevsync", *words)
