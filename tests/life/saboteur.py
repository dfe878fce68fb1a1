"""What users and programs do to volumes by hand, at random, and what is published afterwards.

    PYTHONPATH=agent:tests .venv/bin/python -m life.saboteur --seed 7 --steps 200

Over the kernel in memory. Every choice comes from the seed and the number of the step. After each
step that has settled, an oracle (`fakes.oracle`) compares what is published with what the kernel
has: before the agent looks at all of it, and after that. A falsehood ends the run with the command
that repeats it; `--reduce` finds the fewest steps that lead to the same kind.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import logging
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnBusy, OnStop, Rule
from caam_hotplug.errors import HotplugError, MountError, RequestRefusedError, UnknownError
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.model import DevType, Mount, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import KEY, FakeMapping, Fault
from fakes.oracle import Claim, Falsehood, SeenMapping, SeenMount, System, falsehoods
from fakes.pages import Pages, volume_of

SLOTS: Final = ("sda", "sdb", "sdc")
READER: Final = "sdr1"
"""A reader's card, of which the kernel shows only the partition here."""
LABELS: Final = ("cartridge-01", "cartridge-02", "keep-01", "raw-01", "quiet-01")
ROOT: Final = "/run/media"
FOREIGN: Final = "0 32768 linear 8:99 0"
(_BUILT_IN,) = BUILT_IN
RULES: Final = (
    Rule(name="keep", on_stop=OnStop.KEEP, match=Match(partlabel="keep-*")),
    Rule(name="raw", action=Action.UNLOCK, match=Match(partlabel="raw-*")),
    Rule(
        name="quiet",
        match=Match(partlabel="quiet-*"),
        on_busy=OnBusy.DETACH,
        mount=MountSettings(read_only=True),
    ),
    *BUILT_IN,
)
OTHER_RULES: Final = (
    RULES,
    (*RULES[:3], replace(_BUILT_IN, on_busy=OnBusy.SIGNAL)),
    (*RULES[:3], replace(_BUILT_IN, mount=MountSettings(read_only=True))),
    (Rule(name="none", match=Match(partlabel="cartridge-02")),),
)
COVERED: Final = "something is mounted over it"
"""Words of a mount that no path leads to: a served one may lie on what is over the mount root."""
CURE_S: Final = 200.0
"""Time after which everything that was in the way and has gone is served again."""


@dataclass(frozen=True, slots=True)
class Step:
    """One act, and the seed of its choices: it does the same whatever steps are left out."""

    act: str
    choice: int
    settles: bool
    """Whether everything is waited for, and compared; otherwise the next step comes in between."""


class FalsehoodError(AssertionError):
    """Something is published that is not so."""

    def __init__(self, found: Sequence[Falsehood], after: str) -> None:
        super().__init__("\n".join([*map(str, found), after]))
        self.found = found


class Saboteur:
    """A bench and what is done to it."""

    def __init__(self) -> None:
        self.bench = Bench(RULES)
        self.kernel = self.bench.kernel
        self.hand = self.bench.by_hand
        self.pages = Pages(self.kernel)
        self.without_event: Counter[str] = Counter()
        """Kinds of facts that nobody reports, and only a comparison of everything finds."""
        self._tasks: list[asyncio.Task[Any]] = []
        self._late: list[Volume] = []
        """Volumes that udev has not reported yet."""
        self._written = 0
        self.bench.start()
        self.bench.settle()

    def close(self) -> None:
        for mapping in self.kernel.mappings.values():  # a call that waits for it would never end
            mapping.is_suspended = False
        self.bench.close()

    # Media.

    def plug(self, chance: random.Random) -> None:
        slot = chance.choice(SLOTS)
        if self._media(slot):
            return
        labels = chance.sample(LABELS, chance.choice((1, 1, 2)))
        volumes = self._insert(slot, labels, read_only=chance.random() < 0.1)
        if chance.random() < 0.2:  # udevd is slow or stopped
            for volume in volumes[1:]:
                self.bench.announce(volume)
            self._late += volumes
        else:
            for volume in volumes:
                self.bench.appear(volume)

    def _insert(self, slot: str, labels: Sequence[str], *, read_only: bool) -> list[Volume]:
        kernel, volumes = self.kernel, []
        diskseq = kernel.diskseq + 1
        for number, label in enumerate((None, *labels)):
            name = f"{slot}{number}" if number else slot
            volume = kernel.insert(label or "", name, read_only=read_only)
            kind = DevType.PARTITION if number else DevType.DISK
            named = {} if number else {"partlabel": None}
            volume = replace(volume, id=VolumeId(diskseq, number), devtype=kind, **named)
            kernel.media[name].volume = volume
            volumes.append(volume)
        return volumes

    def _media(self, slot: str) -> list[str]:
        return [n for n in (*self.kernel.media, *self.kernel.away) if n.startswith(slot)]

    def pull(self, chance: random.Random) -> None:
        slot = chance.choice(SLOTS)
        names = sorted(self._media(slot), reverse=chance.random() < 0.5)
        diskseqs = {self._volume_at(name).id.diskseq for name in names}
        self._late = [v for v in self._late if v.id.diskseq not in diskseqs]
        for diskseq in diskseqs:
            self.kernel.held_disks.pop(diskseq, None)
            self.kernel.disk_users.pop(diskseq, None)
        for name in names:
            self.kernel.pull(name)
        for name in names:
            self.bench.report_absent(name)
        self.bench.report_absent(slot)

    def _volume_at(self, name: str) -> Volume:
        return {**self.kernel.media, **self.kernel.away}[name].volume

    def swap(self, chance: random.Random) -> None:
        """Change the card of a reader, whose partition stays while it is in use."""
        label, kernel = chance.choice(LABELS), self.kernel
        if READER in kernel.away:  # ejected: nothing keeps its partition
            kernel.held_disks.pop(kernel.away.pop(READER).volume.id.diskseq, None)
            self.bench.report_absent(READER[:-1])
        if READER not in kernel.media:
            if not any(m.volume.name == READER for m in kernel.unread.values()):
                self.bench.insert(label, READER)
            return
        kernel.change(label, READER)
        self.bench.report_absent(READER)

    def _udev(self) -> None:
        """Report a reader's next card once the kernel has read its table."""
        kernel = self.kernel
        for number in list(kernel.unread):
            leading = [CryptTarget.from_line(m.live or "") for m in kernel.mappings.values()]
            opened = [o.volume.number for o in kernel.open_nodes]
            if number not in [*opened, *(t.device for t in leading if t is not None)]:
                kernel.media.setdefault(READER, kernel.unread.pop(number))
        medium = kernel.media.get(READER)
        if medium is not None and self.bench.serving:
            known = {entry.volume.id for entry in self.bench.registry.entries()}
            if medium.volume.id not in known:
                self.bench.appear(medium.volume)

    def report_late(self, _chance: random.Random) -> None:
        late, self._late = {volume.id for volume in self._late}, []
        for medium in list(self.kernel.media.values()):  # where it is since, if it was ejected
            if medium.volume.id in late:
                self.bench.appear(medium.volume)

    def report_again(self, chance: random.Random) -> None:
        if self.kernel.media:
            self.bench.appear(chance.choice(list(self.kernel.media.values())).volume)

    def lose_events(self, _chance: random.Random) -> None:
        self.bench.lose_events()

    # Mounts.

    def _mount(self, chance: random.Random) -> Mount | None:
        numbers = {mapping.number for mapping in self.kernel.mappings.values()}
        mounts = [mount for mount in self.kernel.mounts if mount.number in numbers]
        return chance.choice(mounts) if mounts else None

    def _mapping(self, chance: random.Random) -> FakeMapping | None:
        live = [m for m in self.kernel.mappings.values() if m.live is not None]
        return chance.choice(live) if live else None

    def write(self, chance: random.Random) -> None:
        if (mount := self._mount(chance)) is not None:
            self._written += 1
            if self.pages.write(mount, f"file {self._written}") and chance.random() < 0.3:
                self.pages.sync(mount)

    def use(self, chance: random.Random) -> None:
        if (mount := self._mount(chance)) is not None:
            self.kernel.users[Path(mount.point).name] = 1

    def end_uses(self, _chance: random.Random) -> None:
        self.kernel.close_holders()

    def umount(self, chance: random.Random) -> None:
        mount = chance.choice(self.kernel.mounts) if self.kernel.mounts else None
        if mount is None or self._is_suspended(self.hand.mount_at(mount.point)):
            return
        with suppress(HotplugError):
            self.hand.umount(mount.point, lazily=chance.random() < 0.4)

    def _is_suspended(self, mount: Mount) -> bool:
        mappings = self.kernel.mappings.values()
        return any(m.number == mount.number and m.is_suspended for m in mappings)

    def bind(self, chance: random.Random) -> None:
        if (mount := self._mount(chance)) is not None:
            self.hand.mount(mount, chance.choice(("/mnt", "/srv", mount.point)))

    def move(self, chance: random.Random) -> None:
        if (mount := self._mount(chance)) is not None:
            self.hand.move(mount.point, chance.choice(("/mnt", "/srv")))

    def cover(self, chance: random.Random) -> None:
        point = f"{ROOT}/{chance.choice(LABELS)}"
        source = chance.choice(("tmpfs", "/dev/dm-1"))
        at = chance.choice((point, point, ROOT))
        self.hand.cover(at if self.bench.serving else point, source)

    def remount(self, chance: random.Random) -> None:
        mount = self._mount(chance)
        if mount is None or self._is_suspended(mount):
            return
        read_only, whole = chance.random() < 0.6, chance.random() < 0.6
        if read_only and whole:
            for mapping in self.kernel.mappings.values():
                if mapping.number == mount.number:
                    self.pages.write_back(mapping, False)
        with suppress(HotplugError):
            self.hand.remount(mount.point, read_only=read_only, filesystem=whole)

    def occupy(self, chance: random.Random) -> None:
        name = chance.choice(LABELS)
        if name not in self.kernel.directories:
            self.kernel.directories[name] = "content"

    def vacate(self, _chance: random.Random) -> None:
        for name in [n for n, kind in self.kernel.directories.items() if kind == "content"]:
            self.kernel.free_mount_point(name)

    # Mappings.

    def suspend(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self.hand.suspend(mapping)

    def resume(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self.hand.resume(mapping)

    def load(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self.hand.load(mapping, chance.choice((FOREIGN, "0 32768 error")))
            if chance.random() < 0.7:
                self.hand.resume(mapping)

    def remove(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            with suppress(HotplugError):
                self.hand.remove(mapping, force=chance.random() < 0.5)

    def rename(self, chance: random.Random) -> None:
        if (mapping := self._mapping(chance)) is not None:
            self.hand.rename(mapping, f"mine-{chance.randrange(1000)}-{mapping.number.minor}")

    def open_mapping(self, chance: random.Random) -> None:
        """Open the node, as losetup and dd do."""
        if (mapping := self._mapping(chance)) is not None:
            mapping.openers = 1

    # The agent.

    def ask(self, chance: random.Random) -> None:
        entries = self.bench.registry.entries()
        if not (self.bench.serving and entries):
            return
        verb = chance.choice(("lock", "unlock", "eject", "eject", "retry"))
        more = {"power_off": chance.random() < 0.6} if verb == "eject" else {}
        with suppress(HotplugError):
            self._tasks.append(self.bench.ask(verb, chance.choice(entries).volume, **more))

    def flood(self, chance: random.Random) -> None:
        for _ in range(chance.randrange(2, 8)):
            self.ask(chance)

    def kill(self, _chance: random.Random) -> None:
        if self.bench.running:
            self.bench.kill()

    def stop(self, chance: random.Random) -> None:
        if self.bench.serving:
            self.bench.request_stop()
            if chance.random() < 0.5:
                self.bench.settle()
            self.bench.wait(100)
            if self._waits():  # a thread that waits for the kernel does not keep the process
                self.bench.kill()
            else:
                self.bench.cancel()

    def start(self, _chance: random.Random) -> None:
        if not self.bench.running:
            lost = (m for m in self.kernel.mappings.values() if m.key not in (KEY, None))
            self.pages.unknown_keys = {mapping.uuid for mapping in lost}
            self.bench.start()

    def reload(self, chance: random.Random) -> None:
        if self.bench.serving:
            self.bench.reload_rules(*chance.choice(OTHER_RULES))

    # The machine.

    def exhaust_descriptors(self, chance: random.Random) -> None:
        for step in ("mounts", "holders", "disk_users", "has_partitions"):
            if chance.random() < 0.7:
                failure = UnknownError("read", step, errno.EMFILE)
                self.kernel.faults.append(Fault(step, failure, lasting=True))

    def end_faults(self, _chance: random.Random) -> None:
        """End all faults, and wait for what is tried again."""
        if self.kernel.faults:
            self.kernel.faults.clear()
            self.bench.wait(40)

    def fail_a_write(self, _chance: random.Random) -> None:
        failure = MountError("flush", "it", errno.EIO)
        self.kernel.faults.append(Fault("flush", failure))

    def sleep(self, chance: random.Random) -> None:
        if self.bench.serving:
            if chance.random() < 0.4:
                self.kernel.new_session()
            self.bench.wake()

    def take_blob(self, chance: random.Random) -> None:
        self.kernel.blobs.pop(f"{chance.choice(LABELS)}.bb", None)

    def give_blobs(self, _chance: random.Random) -> None:
        for name in (f"{label}.bb" for label in LABELS):
            if name not in self.kernel.blobs:
                self.kernel.blobs[name] = KEY
                if self.bench.serving:
                    self.bench.add_blob(name)

    def use_disk(self, chance: random.Random) -> None:
        """Have a neighbour of the volumes mounted by hand, or a program open the disk."""
        disks = {m.volume.id.diskseq for m in self.kernel.media.values()}
        if free := sorted(disks - set(self.kernel.held_disks)):
            self.kernel.disk_users[chance.choice(free)] = ["/dev/sdz9 is mounted at /srv"]

    def end_disk_uses(self, _chance: random.Random) -> None:
        self.kernel.disk_users.clear()

    def reread(self, chance: random.Random) -> None:
        """Have the kernel read the partitions of a disk that nobody holds anew."""
        disks = {m.volume.id.diskseq for m in self.kernel.away.values()}
        if free := sorted(disks - set(self.kernel.held_disks)):
            self.kernel.read_partitions(chance.choice(free))

    def pass_time(self, chance: random.Random) -> None:
        self.bench.wait(chance.choice((0.5, 2.0, 40.0)))

    # Comparison.

    def do(self, step: Step) -> None:
        """Do the step, and compare what is published then, if it settles."""
        chance = random.Random(step.choice)
        self.pages.by_hand, self.pages.agent_sees = True, self.bench.serving
        getattr(self, step.act)(chance)
        self.pages.by_hand = False
        if not step.settles:
            self.bench.run_turns(chance.randrange(1, 30))
            return
        self.settle()
        self.compare()

    def settle(self) -> None:
        """Wait for all that follows from what was done."""
        if self.bench.has_failed:
            self.bench.take_error()
        for _ in range(3):
            self.bench.settle()
            self._udev()
        self.bench.wait(1.5)
        self._udev()
        self.bench.settle()
        self.kernel.steps.clear()
        self.kernel.subjects.clear()

    def compare(self) -> None:
        """Compare what is published with the kernel, before and after the agent looks at all.

        Raises: FalsehoodError.
        """
        if self.bench.has_failed:
            raise FalsehoodError([], f"the agent has ended: {self.bench.take_error()!r}")
        self._require_answers()
        if not self.bench.serving or self.kernel.faults:
            return  # nothing is published, or it cannot be known
        before = self._false()
        if before:
            self.bench.lose_events()
            self.bench.report_mounts()
            self.settle()
        if found := (self._false() if before else []):
            raise FalsehoodError(found, self.state())
        self.without_event.update({each.kind for each in before})

    def _require_answers(self) -> None:
        open_ones = [task for task in self._tasks if not task.done()]
        for task in self._tasks:
            if task.done() and not task.cancelled():
                error = task.exception()
                if error is not None and not isinstance(error, HotplugError):
                    raise FalsehoodError([], f"answered with {error!r}")
        self._tasks = open_ones if self._waits() else []
        if open_ones and self.bench.serving and not self._waits():
            raise FalsehoodError([], f"{len(open_ones)} requests have no answer\n{self.state()}")

    def _waits(self) -> bool:
        """Whether a call of the agent may wait for a suspended mapping."""
        return any(mapping.is_suspended for mapping in self.kernel.mappings.values())

    def _false(self) -> list[Falsehood]:
        return falsehoods(self._claims(), self._system())

    def _claims(self) -> list[Claim]:
        return [
            Claim(
                str(entry.volume.id),
                entry.state.value,
                entry.reason,
                entry.mapping_name,
                entry.mount_point,
                entry.read_only,
            )
            for entry in self.bench.registry.entries()
        ]

    def _system(self) -> System:
        kernel = self.kernel
        there = [m.volume for m in kernel.media.values()]
        return System(
            media={str(v.id): str(v.number) for v in there},
            away={str(m.volume.id) for m in kernel.away.values()},
            unreported={str(volume.id) for volume in self._late},
            mappings=[self._seen(mapping) for mapping in kernel.mappings.values()],
            mounts=[self._seen_mount(mount) for mount in kernel.mounts],
            keys=[name for keyring in kernel.keyrings for name in keyring],
            users={str(diskseq): users for diskseq, users in kernel.disk_users.items()},
            lost={v: texts for v, texts in self.pages.lost.items() if texts},
            foreign=self.pages.misplaced,
        )

    def _seen(self, mapping: FakeMapping) -> SeenMapping:
        openers = self.kernel.open_count(mapping) - mapping.watches
        return SeenMapping(
            mapping.name, volume_of(mapping), str(mapping.number), mapping.live or "", openers,
            mapping.is_suspended,
        )  # fmt: skip

    def _seen_mount(self, mount: Mount) -> SeenMount:
        return SeenMount(str(mount.number), mount.point, mount.read_only, self._is_seen(mount))

    def _is_seen(self, mount: Mount) -> bool:
        """Whether the path of the mount leads to it: nothing lies over it or its parents."""
        mounts = self.kernel.mounts
        if any(m.parent == mount.identity and m.point == mount.point for m in mounts):
            return False
        roots = [m for m in mounts if m.point == ROOT]
        on_top = roots[-1].identity if roots else 0
        below = mount
        while (
            below.point != ROOT and below.parent and below.parent not in {r.identity for r in roots}
        ):
            below = next(
                (m for m in mounts if m.identity == below.parent), replace(below, parent=0)
            )
        return mount.point == ROOT or not mount.point.startswith(ROOT) or below.parent == on_top

    def state(self) -> str:
        """Return what is published and what the kernel has, for a report."""
        return "\n".join(
            ["  published:", *(f"    {c}" for c in self._claims()), f"  kernel: {self._system()}"]
        )

    def finish(self) -> None:
        """Undo all that was done, and require that every medium is served, and then nothing left.

        Raises: FalsehoodError.
        """
        chance = random.Random(0)
        self.kernel.faults.clear()
        self.pages.agent_sees, self.pages.by_hand = False, True
        self.start(chance)
        for undo in (
            self.give_blobs,
            self.vacate,
            self.report_late,
            self.end_uses,
            self.end_disk_uses,
        ):
            undo(chance)
        for mapping in list(self.kernel.mappings.values()):
            mapping.inactive = None
            self.hand.resume(mapping)
        self.settle()
        self._unmount_others()
        self.bench.reload_rules(*RULES)
        self.bench.wait(CURE_S)
        self._follow_advice()
        self.settle()
        self.compare()
        holders = {c.volume for c in self._claims() if c.state in ("mounted", "unlocked")}
        bad = [
            Falsehood("not served", c.volume, f"{c.state}: {c.reason}")
            for c in self._claims()
            if c.state in ("failed", "conflict", "waiting")
            and COVERED not in c.reason
            and c.reason.rpartition(" belongs to volume ")[2].partition(";")[0] not in holders
        ]
        if bad:
            raise FalsehoodError(bad, self.state())
        self._pull_all()

    def _follow_advice(self) -> None:
        """Lock volumes of which it is said that this releases them."""
        for entry in self.bench.registry.entries():
            if "`lock` releases it" in entry.reason:
                with suppress(RequestRefusedError):  # what it says then is compared
                    self.bench.answer("lock", entry.volume)

    def _unmount_others(self) -> None:
        """Unmount what users have mounted, from the top."""
        claims = [c for c in self._claims() if c.state == "mounted"]
        mappings = {m.name: str(m.number) for m in self.kernel.mappings.values()}
        served = {(mappings.get(c.mapping), c.point) for c in claims}
        for mount in reversed(list(self.kernel.mounts)):
            if (str(mount.number), mount.point) not in served or mount.point in ("/mnt", "/srv"):
                with suppress(HotplugError, StopIteration):
                    self.hand.umount(mount.point)
                    self.settle()

    def _pull_all(self) -> None:
        for name in list({**self.kernel.media, **self.kernel.away}):
            self.kernel.held_disks.clear()
            self.kernel.pull(name)
            self.bench.report_absent(name)
        for disk in (*SLOTS, READER[:-1]):
            self.bench.report_absent(disk)
        self.kernel.unread.clear()
        self.settle()
        self._unmount_others()
        sizes = {n: c for n, c in self.bench.table_sizes().items() if c != (n == "tasks")}
        self.bench.kill()
        self.bench.start()  # which removes directories that nothing is mounted on
        self.bench.settle()
        self.bench.stop()
        if left := [*self.kernel.leftovers(), *map(str, sizes.items())]:
            raise FalsehoodError([Falsehood("left over", "all", ", ".join(left))], "all are pulled")


WEIGHTS: Final = {
    "plug": 14, "pull": 7, "swap": 5, "report_late": 3, "report_again": 2, "lose_events": 1,
    "write": 10, "use": 4, "end_uses": 4, "umount": 7, "bind": 3, "move": 1, "cover": 2,
    "remount": 5, "occupy": 1, "vacate": 1, "suspend": 3, "resume": 4, "load": 3, "remove": 3,
    "rename": 1, "open_mapping": 2, "ask": 14, "flood": 1, "kill": 2, "stop": 1, "start": 6,
    "reload": 1, "exhaust_descriptors": 1, "end_faults": 4, "fail_a_write": 1, "sleep": 2,
    "take_blob": 1, "give_blobs": 2, "use_disk": 1, "end_disk_uses": 2, "reread": 1, "pass_time": 3,
}  # fmt: skip
"""How often each act is done."""


def plan(seed: int, count: int) -> list[Step]:
    """Return the steps of a seed; more steps begin with the same ones."""
    chance = random.Random(seed)
    acts, weights = list(WEIGHTS), list(WEIGHTS.values())
    return [
        Step(chance.choices(acts, weights)[0], chance.getrandbits(32), chance.random() < 0.6)
        for _ in range(count)
    ]


def sabotage(steps: Iterable[Step], say: Callable[[str], None] = lambda _: None) -> Counter[str]:
    """Do all steps, and undo them. Returns: facts without event. Raises: FalsehoodError."""
    saboteur = Saboteur()
    try:
        for number, step in enumerate(steps, 1):
            say(f"step {number}: {step.act} {step.choice}{'' if step.settles else ', in between'}")
            try:
                saboteur.do(step)
            except FalsehoodError as error:
                error.add_note(f"at step {number}: {step}")
                raise
        say("all is undone")
        saboteur.finish()
        return saboteur.without_event
    finally:
        saboteur.close()


def kinds_of(steps: Sequence[Step]) -> frozenset[str]:
    """Return the kinds of falsehood that the steps lead to."""
    try:
        sabotage(steps)
    except FalsehoodError as error:
        return frozenset(each.kind for each in error.found) or frozenset({str(error)[:20]})
    except Exception as error:
        return frozenset({repr(error)[:60]})
    return frozenset()


def reduced(steps: Sequence[Step]) -> list[Step]:
    """Return as few of the steps as lead to the same kind of falsehood."""
    kept, wanted = list(steps), kinds_of(steps)
    size = len(kept) // 2
    while size:
        at = 0
        while at < len(kept):
            fewer = kept[:at] + kept[at + size :]
            if kinds_of(fewer) & wanted:
                kept = fewer
            else:
                at += size
        size //= 2
    return kept


def run(seed: int, count: int) -> Counter[str]:
    """Do the steps of a seed. Raises: FalsehoodError, with the command that repeats it."""
    try:
        return sabotage(plan(seed, count))
    except Exception as error:
        error.add_note(f"repeat it with: {COMMAND} --seed {seed} --steps {count}")
        raise


COMMAND: Final = "PYTHONPATH=agent:tests .venv/bin/python -m life.saboteur"


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="life.saboteur", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.randrange(1 << 32))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, from this one on")
    parser.add_argument("--reduce", action="store_true", help="find the fewest steps")
    parser.add_argument("--log", action="store_true", help="show steps and log")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO if options.log else logging.CRITICAL,
        stream=sys.stdout,
        format="      %(message)s",
    )
    found: Counter[str] = Counter()
    for seed in range(options.seed, options.seed + options.seeds):
        steps = plan(seed, options.steps)
        if options.reduce:
            logging.disable()
            steps = reduced(steps)
            logging.disable(logging.NOTSET)
            for step in steps:
                print(step)
        found += sabotage(steps, print) if options.log else run(seed, options.steps)
    print(f"{options.seeds} seeds of {options.steps} steps from {options.seed}: no falsehood")
    print(f"without event: {dict(found)}")


if __name__ == "__main__":
    main()
