"""Compares what an agent publishes with what the kernel has; the agent may look first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from fakes.contract import until
from fakes.oracle import Claim, Falsehood, falsehoods
from kernel.asked import Asked
from kernel.forked import Agent
from kernel.seen import Disks

SETTLES_WITHIN_S: Final = 4.0
"""Until then what is published may follow from the kernel's events alone."""
LOOKED_WITHIN_S: Final = 30.0

RENUMBERED_WITHIN_S: Final = 45.0
"""A disk that is offline is looked at again after 1, 2, 4 … 30 s."""


class FalsehoodError(AssertionError):
    """Something is published that is not so."""

    def __init__(self, found: Sequence[Falsehood], after: str) -> None:
        super().__init__("\n".join([*map(str, found), after]))
        self.found = found


@dataclass
class Figures:
    """What was done, and what was compared."""

    acts: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    """States that were compared."""
    without_event: Counter[str] = field(default_factory=Counter)
    """Kinds of facts that were found by looks alone."""
    comparisons: int = 0
    files_checked: int = 0


class Comparison:
    """Compares an agent with the kernel by the oracle of `fakes.oracle`."""

    def __init__(self, process: Agent, agent: Asked, disks: Disks) -> None:
        self.figures = Figures()
        self._process = process
        self._agent = agent
        self._disks = disks

    def compare(self, *, within_s: float = SETTLES_WITHIN_S + LOOKED_WITHIN_S) -> None:
        """Wait until what is published is what the kernel has. Raises: FalsehoodError."""
        found = self._false_after(min(within_s, SETTLES_WITHIN_S), look=False)
        if found:
            kinds = {each.kind for each in found}
            if found := self._false_after(within_s - SETTLES_WITHIN_S, look=True):
                raise FalsehoodError(found, self.state())
            self.figures.without_event.update(kinds)
        self.figures.comparisons += 1
        self.figures.states.update(claim.state for claim in self._agent.claims(look=False))

    def await_numbers(self) -> None:
        """Wait until disks that were offline are published under their new numbers.

        Raises: FalsehoodError.
        """
        found: list[Falsehood] = []

        def is_so() -> bool:
            self._process.forget()
            found[:] = self._disks.has_number_of_before(self._agent.claims(look=True))
            return not found

        with suppress(AssertionError):
            until(is_so, within_s=RENUMBERED_WITHIN_S, every_s=0.2)
        if found:
            raise FalsehoodError(found, self.state())

    def served_by(self, verb: str) -> list[str]:
        """Return the published volumes that a request for this has to reach: no whole disks."""
        claims = self._agent.claims(look=False)
        there = self._disks.system({claim.volume for claim in claims}).media
        return [
            claim.volume
            for claim in claims
            if (claim.volume in there and not claim.volume.endswith("-0"))
            or (claim.state in ("ejected", "locked") and verb == "unlock")  # its disk is emptied
        ]

    def state(self) -> str:
        """Return what is published and what the kernel has, for a report."""
        claims = self._agent.claims(look=False)
        system = self._disks.system({claim.volume for claim in claims})
        return "\n".join(["published:", *map(str, claims), str(system)])

    def _false_after(self, within_s: float, *, look: bool) -> list[Falsehood]:
        """Return what is still false when the time is over."""
        found: list[Falsehood] = []

        def is_true() -> bool:
            nonlocal found
            self._process.forget()
            found = self._false(self._agent.claims(look=look))
            return not found

        with suppress(AssertionError):
            until(is_true, within_s=within_s, every_s=0.1)
        return found

    def _false(self, claims: list[Claim]) -> list[Falsehood]:
        system = self._disks.system({claim.volume for claim in claims})
        waiting = {m.volume for m in system.mappings if m.is_suspended}
        stuck = {c.volume for c in claims if c.state == "stuck"} & waiting  # as it says
        found = [*falsehoods(claims, system), *self._misplaced(claims), *self._disks.unread(claims)]
        return [each for each in found if each.volume not in stuck]

    def _misplaced(self, claims: list[Claim]) -> Iterator[Falsehood]:
        """Yield media that are mounted where others belong."""
        for claim in claims:
            label = self._disks.label_of(claim.volume)
            if claim.point and label and Path(claim.point).name != label:
                words = f"{label} is mounted at {claim.point}"
                yield Falsehood("wrong medium", claim.volume, words)
