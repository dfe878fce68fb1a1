"""What users and programs do to media by hand, at random, over the real kernel.

    python3 -m kernel.saboteur --seed 7 --steps 100

Runs in the guest, as root. Every choice comes from the seed and the number of the step. After each
step that settles, an oracle (`fakes.oracle`) compares what is published with what the kernel has.
In the end all is undone, everything must be served, and each synced file be on its medium.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from fakes.oracle import Falsehood
from kernel.agents import Room, room_of
from kernel.asked import Asked, asked
from kernel.by_hand import WEIGHTS, ByHand
from kernel.cartridges import HELLO, TEXT, cartridges
from kernel.compared import Comparison, FalsehoodError, Figures
from kernel.gadgets import Reader, reader_with
from kernel.seen import Disks
from kernel.storms import log_shown_on_failure
from kernel.witness import run
from kernel.written import Written

LABELS: Final = ("cartridge-01", "cartridge-02", "cartridge-03")
UNTOUCHED: Final = "compared-01"
CARDS: Final = ("cartridge-04", UNTOUCHED)
RULE: Final = f"""
[[rule]]
name = "compared"
match.partlabel = "{UNTOUCHED}"
mount.read_only = true
"""
COMMAND: Final = "python3 -m kernel.saboteur"


@dataclass(frozen=True, slots=True)
class Step:
    """One act, and the seed of its choices."""

    act: str
    choice: int
    settles: bool
    """Whether what is published is compared then."""


class Saboteur:
    """A room with an agent, and what is done to its media."""

    def __init__(self, room: Room, agent: Asked, reader: Reader) -> None:
        self._room = room
        self._agent = agent
        self._reader = reader
        room.configure(RULE)
        for card in reader.cards:
            shutil.copyfile(room.blobs / f"{LABELS[0]}.bb", room.blobs / f"{card.label}.bb")
        self.written = Written(room.media, reader.cards, untouched={UNTOUCHED})
        disks = Disks(room.media, reader)
        self.hand = ByHand(room, agent, disks, reader, self.written)
        self.comparison = Comparison(room.agent, agent, disks)
        self.figures = self.comparison.figures
        agent.start()

    def serve_one(self) -> None:
        """Plug a medium, and wait until it is served."""
        self._room.plug_and_check()
        self._compare()

    def _compare(self) -> None:
        self.hand.settle()
        self.comparison.compare()

    def plug_all(self) -> None:
        """Plug all media that are out, and have a card in the reader; wait for none of them."""
        for medium in self._room.media:
            if not medium.is_plugged:
                medium.plug()
        if self._reader.card is None or not self._reader.is_on:
            self._reader.put_in(self._reader.cards[0])

    def do(self, step: Step) -> None:
        """Do the step, and compare what is published then. Raises: FalsehoodError."""
        chance = random.Random(step.choice)
        self.figures.acts[step.act] += 1
        self.hand.starts_in -= 1
        if self.hand.starts_in == 0:
            self.hand.start(chance)
        getattr(self.hand, step.act)(chance)
        if self._room.agent.pid:
            self._room.agent.forget()  # it would block on a full pipe
            if self.hand.is_exhausted:
                self._agent.claims(look=True)  # it answers
            elif step.settles:
                self._compare()
        if touched := self.written.touched():
            raise FalsehoodError([Falsehood("foreign byte", "medium", t) for t in touched], "")

    def finish(self) -> None:
        """Undo all, require that every medium is served, and that each has its synced files.

        Raises: FalsehoodError.
        """
        chance, hand = random.Random(0), self.hand
        hand.relieve(chance)
        for undo in (hand.start_udevd, hand.end_uses, hand.come_back, hand.resume, hand.start):
            undo(chance)
        while found := hand.mounts_by_hand():
            run("umount", found[-1])
        self.plug_all()
        self._compare()
        self.comparison.await_numbers()
        self._require_obedience()
        hand.write_at(str(self._room.point()), b"written in the end", is_synced=True)
        (other,) = (card for card in self._reader.cards if card is not self._reader.card)
        self._reader.put_in(other)
        self._room.check_served(other)
        self._compare()
        self._room.agent.stop()
        self._agent.close()
        wrong = self.written.wrong()
        self.figures.files_checked = self.written.files_checked
        if wrong:
            raise FalsehoodError([Falsehood("lost byte", "medium", text) for text in wrong], "")

    def _require_obedience(self) -> None:
        """Require that each volume is locked and served again on request: nothing is in the way.

        Raises: FalsehoodError.
        """
        for verb, state in (("lock", "locked"), ("unlock", "mounted")):
            there = self.comparison.served_by(verb)
            answers = {volume: self._agent.request(verb, volume) for volume in there}
            self._compare()
            wrong = [
                Falsehood("refusal", claim.volume, f"{verb}: {answers[claim.volume]}: {claim}")
                for claim in self._agent.claims(look=False)
                if claim.volume in there and claim.state != state
            ]
            if wrong:
                raise FalsehoodError(wrong, self.comparison.state())
        for medium in (*self._room.media, self._reader.card):
            assert (self._room.point(medium) / HELLO).read_bytes() == TEXT


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
        reader_with(CARDS, media[0].contents) as reader,
        room_of(media) as room,
        asked(room.agent) as agent,
        log_shown_on_failure(room, say),
    ):
        saboteur = Saboteur(room, agent, reader)
        try:
            yield saboteur
        finally:
            saboteur.hand.end_uses(random.Random(0))
            saboteur.hand.start_udevd(random.Random(0))


def sabotage(seed: int, count: int, say: Callable[[str], None]) -> Figures:
    """Do the steps of a seed. Raises: FalsehoodError, with the command that repeats it."""
    number = 0
    with at_work(say) as saboteur:
        try:
            saboteur.plug_all()
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
