"""What users and programs do to media by hand, at random, over the real kernel.

    python3 -m kernel.saboteur --seed 7 --steps 100

Runs in the guest, as root. Every choice comes from the seed and the number of the step. After each
step that settles, the oracle of `life.saboteur` compares what is published with what the kernel
has. In the end all is undone, everything must be served, and each synced file be on its medium.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fakes.contract import until
from fakes.oracle import Claim, Falsehood, SeenMapping, falsehoods
from kernel import seen
from kernel.agents import Room, room_of
from kernel.asked import Asked, asked
from kernel.cartridges import KEY, Cartridge, cartridges
from kernel.storms import log_shown_on_failure
from kernel.witness import attempt, detach, run

LABELS: Final = ("cartridge-01", "cartridge-02", "cartridge-03")
UNSAID: Final = frozenset({"suspended"})
"""Kinds that `status` does not say yet: `lock` and `eject` do."""
SETTLES_WITHIN_S: Final = 4.0
"""Until then what is published may follow from the kernel's events alone."""
LOOKED_WITHIN_S: Final = 30.0
ELSEWHERE: Final = ("/mnt", "/srv")
WEIGHTS: Final = {
    "plug": 12, "pull": 5, "write": 10, "umount": 5, "umount_lazily": 3, "bind": 3, "cover": 3,
    "uncover": 5, "remount": 5, "suspend": 3, "resume": 4, "load": 3, "remove": 2, "hold": 3,
    "open_mapping": 2, "end_uses": 6, "ask": 14, "kill": 2, "stop": 1,
    "go_offline": 2, "come_back": 4,
}  # fmt: skip
"""How often each act is done."""


@dataclass(frozen=True, slots=True)
class Step:
    """One act, and the seed of its choices."""

    act: str
    choice: int
    settles: bool
    """Whether what is published is compared then."""


class FalsehoodError(AssertionError):
    """Something is published that is not so."""

    def __init__(self, found: Sequence[Falsehood], after: str) -> None:
        super().__init__("\n".join([*map(str, found), after]))
        self.found = found


@dataclass
class Figures:
    """What was done."""

    acts: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    """States that were compared."""
    without_event: Counter[str] = field(default_factory=Counter)
    """Kinds of facts that were found by looks alone."""
    comparisons: int = 0
    files_checked: int = 0


class Saboteur:
    """A room with an agent, and what is done to its media."""

    def __init__(self, room: Room, agent: Asked) -> None:
        self._room = room
        self._agent = agent
        self.figures = Figures()
        self._held: list[subprocess.Popen[bytes]] = []
        self._files: dict[str, dict[str, str]] = {label: {} for label in LABELS}
        """Digests of synced files, by the medium's label."""
        self._outside: dict[str, bytes] = {}
        self._disks = seen.Disks(room.media)
        self._starts_in = 0
        """Steps until an agent that has ended is started."""
        for medium in room.media:
            with plugged(medium):
                self._outside[medium.label] = seen.outside(medium)
        agent.start()

    def close(self) -> None:
        """End all uses."""
        self._end_uses()

    # What there is.

    def _mappings(self) -> list[SeenMapping]:
        return sorted(seen.mappings(), key=lambda mapping: mapping.name)

    def _mapping(self, chance: random.Random) -> SeenMapping | None:
        found = self._mappings()
        return chance.choice(found) if found else None

    def _point(self, chance: random.Random) -> str | None:
        """Return where something of the agent's is mounted that answers."""
        usable = {m.number for m in self._mappings() if not m.is_suspended}
        mounts = seen.lines()
        found = [
            m.point
            for m in mounts
            if m.number in usable and seen.seen_at(m.point, mounts) == m.identity
        ]
        return chance.choice(sorted(found)) if found else None

    # Acts.

    def plug(self, chance: random.Random) -> None:
        if out := [medium for medium in self._room.media if not medium.is_plugged]:
            chance.choice(out).plug()

    def pull(self, chance: random.Random) -> None:
        if there := [medium for medium in self._room.media if medium.is_plugged]:
            with suppress(OSError, ValueError):  # the agent has ejected it meanwhile
                chance.choice(there).pull()

    def write(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is None:
            return
        content = chance.randbytes(chance.randrange(1, 20_000))
        name = f"file-{sum(map(len, self._files.values())):04}"
        is_synced = chance.random() < 0.7
        label = self._label_of(point)
        with suppress(OSError):
            with open(f"{point}/{name}", "xb") as file:
                file.write(content)
                file.flush()
                if is_synced:
                    os.fsync(file)
            if is_synced and label:
                folder = os.open(point, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
                self.expect_file(label, name, content)

    def expect_file(self, label: str, name: str, content: bytes) -> None:
        """Require in the end that the file is on the medium."""
        self._files[label][name] = hashlib.sha256(content).hexdigest()

    def _label_of(self, point: str) -> str:
        """Return the label of the medium that is mounted there; empty if no table leads to one."""
        mounts = seen.lines()
        identity = seen.seen_at(point, mounts)
        numbers = {mount.number for mount in mounts if mount.identity == identity}
        below = {m.leads_to for m in self._mappings() if m.number in numbers}
        for medium in self._room.media:
            if below & set(self._disks.volumes_of(medium).values()):
                return medium.label
        return ""

    def umount(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("umount", point)

    def umount_lazily(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("umount", "-l", point)

    def bind(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("mount", "--bind", point, chance.choice((*ELSEWHERE, point)))

    def cover(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            attempt("mount", "-t", "tmpfs", "-o", "mode=0755", "others", point)

    def uncover(self, chance: random.Random) -> None:
        """Unmount one of the mounts that were made by hand."""
        found = self._mounts_by_hand()
        if found:
            attempt("umount", chance.choice(found))

    def _mounts_by_hand(self) -> list[str]:
        mounts = seen.lines()
        return [
            m.point
            for m in mounts
            if m.point in ELSEWHERE
            or (m.filesystem == "tmpfs" and m.point.startswith(f"{self._room.mount_root}/"))
        ]

    def remount(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            options = ["remount", chance.choice(("ro", "rw")), *chance.choice(([], ["bind"]))]
            attempt("mount", "-o", ",".join(options), point)

    def suspend(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            attempt("dmsetup", "suspend", "--noflush", "--nolockfs", mapping.name)

    def resume(self, _chance: random.Random) -> None:
        for mapping in self._mappings():
            if mapping.is_suspended:
                attempt("dmsetup", "resume", mapping.name)

    def load(self, chance: random.Random) -> None:
        mapping = self._mapping(chance)
        if mapping is None or not mapping.table:
            return
        size = mapping.table.split()[1]
        attempt("dmsetup", "suspend", "--noflush", "--nolockfs", mapping.name)
        target = chance.choice(("error", "zero"))
        attempt("dmsetup", "reload", mapping.name, "--table", f"0 {size} {target}")
        if chance.random() < 0.7:
            attempt("dmsetup", "resume", mapping.name)

    def remove(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None and not mapping.is_suspended:
            force = ["-f"] if chance.random() < 0.5 else []
            attempt("dmsetup", "remove", *force, mapping.name)

    def hold(self, chance: random.Random) -> None:
        if (point := self._point(chance)) is not None:
            self._hold(f"{point}/hello.txt")

    def open_mapping(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self._hold(f"/dev/dm-{mapping.number.partition(':')[2]}")

    def _hold(self, path: str) -> None:
        with suppress(OSError), open(path, "rb", buffering=0) as file:
            self._held.append(subprocess.Popen(["sleep", "infinity"], stdin=file))

    def end_uses(self, _chance: random.Random) -> None:
        self._end_uses()

    def _end_uses(self) -> None:
        while self._held:
            process = self._held.pop()
            process.kill()
            process.wait()

    def ask(self, chance: random.Random) -> None:
        if not self._room.agent.pid:
            return
        claims = self._agent.claims(look=False)
        verb = chance.choice(("lock", "unlock", "eject", "eject", "retry"))
        if claims:
            self._agent.request(verb, chance.choice(claims).volume)

    def kill(self, chance: random.Random) -> None:
        if self._room.agent.pid:
            self._end_waits(chance)
            self._room.agent.kill()
            self._starts_in = chance.randrange(1, 6)

    def stop(self, chance: random.Random) -> None:
        if self._room.agent.pid:
            self._end_waits(chance)
            self._room.agent.stop()
            self._starts_in = chance.randrange(1, 6)

    def _end_waits(self, chance: random.Random) -> None:
        """Resume what a call of the agent waits for: nothing ends a process in such a call."""
        if any(claim.state == "stuck" for claim in self._agent.claims(look=False)):
            self.resume(chance)

    def start(self, _chance: random.Random) -> None:
        if not self._room.agent.pid:
            self._agent.start()

    def go_offline(self, chance: random.Random) -> None:
        self._set_state(chance.choice(self._room.media), "offline")

    def come_back(self, _chance: random.Random) -> None:
        for medium in self._room.media:
            self._set_state(medium, "running")

    def _set_state(self, medium: Cartridge, state: str) -> None:
        with suppress(OSError, ValueError):  # it is out, or being removed
            file = medium.disk / "device/state"
            if file.read_text().strip() != state:
                file.write_text(f"{state}\n")

    # Comparison.

    def serve_one(self) -> None:
        """Plug a medium, and wait until it is served."""
        self._room.plug_and_check()
        self.compare()

    def do(self, step: Step) -> None:
        """Do the step, and compare what is published then. Raises: FalsehoodError."""
        self.figures.acts[step.act] += 1
        self._starts_in -= 1
        if self._starts_in == 0:
            self.start(random.Random(step.choice))
        getattr(self, step.act)(random.Random(step.choice))
        if self._room.agent.pid:
            self._room.agent.forget()  # it would block on a full pipe
            if step.settles:
                self.compare()

    def compare(self, *, within_s: float = SETTLES_WITHIN_S + LOOKED_WITHIN_S) -> None:
        """Wait until what is published is what the kernel has. Raises: FalsehoodError."""
        run("udevadm", "settle")
        found = self._false_after(min(within_s, SETTLES_WITHIN_S), look=False)
        if found:
            kinds = {each.kind for each in found}
            if found := self._false_after(within_s - SETTLES_WITHIN_S, look=True):
                raise FalsehoodError(found, self.state())
            self.figures.without_event.update(kinds)
        self.figures.comparisons += 1
        self.figures.states.update(claim.state for claim in self._agent.claims(look=False))

    def _false_after(self, within_s: float, *, look: bool) -> list[Falsehood]:
        """Return what is still false when the time is over."""
        found: list[Falsehood] = []

        def is_true() -> bool:
            nonlocal found
            self._room.agent.forget()
            found = self._false(self._agent.claims(look=look))
            return not found

        with suppress(AssertionError):
            until(is_true, within_s=within_s, every_s=0.1)
        return found

    def _false(self, claims: list[Claim]) -> list[Falsehood]:
        system = self._disks.system({claim.volume for claim in claims})
        waiting = {m.volume for m in system.mappings if m.is_suspended}
        stuck = {c.volume for c in claims if c.state == "stuck"} & waiting  # as it says
        found = falsehoods(claims, system)
        return [e for e in found if e.kind not in UNSAID and e.volume not in stuck]

    def state(self) -> str:
        """Return what is published and what the kernel has, for a report."""
        claims = self._agent.claims(look=False)
        system = self._disks.system({claim.volume for claim in claims})
        return "\n".join(["published:", *map(str, claims), str(system)])

    # The end.

    def finish(self) -> None:
        """Undo all, require that every medium is served, and that each has its synced files.

        Raises: FalsehoodError.
        """
        chance = random.Random(0)
        for undo in (self.end_uses, self.come_back, self.resume, self.start):
            undo(chance)
        while found := self._mounts_by_hand():
            run("umount", found[-1])
        self.compare()
        for medium in self._room.media:
            if medium.is_plugged:
                medium.pull()
        self.compare()
        self._end_uses()
        for medium in self._room.media:
            medium.plug()
            self._room.check_served(medium)
        self.compare()
        self._room.agent.stop()
        self._agent.close()
        missing = [text for medium in self._room.media for text in self._missing(medium)]
        if missing:
            raise FalsehoodError([Falsehood("lost byte", "medium", t) for t in missing], "")

    def _missing(self, medium: Cartridge) -> list[str]:
        """Return what is not on the medium, or is where nobody has written."""
        found = []
        with copied(medium) as point:
            for name, digest in self._files[medium.label].items():
                self.figures.files_checked += 1
                file = point / name
                if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
                    found.append(f"{name} of {medium.label}")
        if seen.outside(medium) != self._outside[medium.label]:
            found.append(f"bytes of {medium.label} outside its partition")
        return found


@contextmanager
def plugged(medium: Cartridge) -> Iterator[None]:
    """Have the medium plugged, while no agent runs."""
    medium.plug()
    medium.settle()
    until(Path(medium.partition).exists)
    yield
    medium.pull()


@contextmanager
def copied(medium: Cartridge) -> Iterator[Path]:
    """Mount a copy of the plugged medium, by the key that it was made with; yield the place."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = Path(folder) / "copy"
        file.write_bytes(Path(medium.partition).read_bytes())
        sectors = file.stat().st_size // 512
        device = run("losetup", "-f", "--show", str(file)).strip()
        try:
            table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {device} 0"
            run("dmsetup", "create", "copied", "--table", table)
            try:
                run("mount", "/dev/mapper/copied", "/mnt")
                yield Path("/mnt")
                run("umount", "/mnt")
            finally:
                run("dmsetup", "remove", "--retry", "copied")
        finally:
            detach(device)


def plan(seed: int, count: int) -> list[Step]:
    """Return the steps of a seed; more steps begin with the same ones."""
    chance = random.Random(seed)
    acts, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [
        Step(chance.choices(acts, weights)[0], chance.getrandbits(32), chance.random() < 0.6)
        for _ in range(count)
    ]


@contextmanager
def at_work(say: Callable[[str], None]) -> Iterator[Saboteur]:
    """Have a saboteur in a new room."""
    with (
        cartridges(LABELS) as media,
        room_of(media) as room,
        asked(room.agent) as agent,
        log_shown_on_failure(room, say),
    ):
        saboteur = Saboteur(room, agent)
        try:
            yield saboteur
        finally:
            saboteur.close()


def sabotage(seed: int, count: int, say: Callable[[str], None]) -> Figures:
    """Do the steps of a seed. Raises: FalsehoodError, with the command that repeats it."""
    number = 0
    with at_work(say) as saboteur:
        try:
            for number, step in enumerate(plan(seed, count), 1):
                begun = time.monotonic()
                saboteur.do(step)
                took_s = time.monotonic() - begun
                between = "" if step.settles else ", in between"
                say(f"step {number}: {step.act}{between} ({took_s:.2f} s)")
            saboteur.finish()
        except BaseException as error:
            error.add_note(f"repeat it with: {COMMAND} --seed {seed} --steps {number}")
            raise
        return saboteur.figures


COMMAND: Final = "python3 -m kernel.saboteur"


def main() -> int:
    """Run the command. Returns: the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from this one on")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.seeds):
        begun = time.monotonic()
        figures = sabotage(seed, options.steps, lambda line: print(line, flush=True))
        print(f"seed {seed}: {options.steps} steps in {time.monotonic() - begun:.0f} s")
        print(figures, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
