"""Whether what the agent publishes is what the kernel has, from facts that others have read.

It knows nothing of the agent's code but the names of its states and some of its words. Those who
use it read the kernel by their own means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

RELEASED: Final = frozenset({"ignored", "locked", "ejected"})
"""States in which the kernel has nothing of a volume."""
PASSING: Final = frozenset({"unlocking", "mounting", "detaching", "stuck"})
"""States that end by themselves, once nothing hangs."""
LOSS: Final = ("may be lost", "not all has reached the medium", "not known whether all was written")
"""Words that say that a medium lacks what was written to it."""


@dataclass(frozen=True, slots=True)
class Claim:
    """What is published of one volume."""

    volume: str
    """Disk sequence number and partition, such as 7-1."""
    state: str
    reason: str = ""
    mapping: str = ""
    point: str = ""
    read_only: bool = False

    @property
    def disk(self) -> str:
        """Disk sequence number."""
        return self.volume.partition("-")[0]

    @property
    def says_loss(self) -> bool:
        """Whether it says that the medium lacks what was written to it."""
        return self.state == "removed-unsafely" or any(words in self.reason for words in LOSS)


@dataclass(frozen=True, slots=True)
class SeenMapping:
    """A mapping of the agent, as device-mapper has it."""

    name: str
    volume: str
    number: str
    table: str
    openers: int
    """How many have it open, without the agent."""
    is_suspended: bool = False

    @property
    def has_key(self) -> bool:
        """Whether it encrypts and decrypts."""
        return " crypt " in self.table

    @property
    def leads_to(self) -> str:
        """Number of the device below it; empty if its table is none of the agent's."""
        words = self.table.split()
        return words[6] if self.has_key and self.table.count("\n") == 0 else ""


@dataclass(frozen=True, slots=True)
class SeenMount:
    """A mount, as mountinfo has it."""

    number: str
    point: str
    read_only: bool
    is_on_top: bool = True
    """Whether it is what is seen at its point."""


@dataclass(slots=True)
class System:
    """What the kernel has, and the media."""

    media: dict[str, str] = field(default_factory=dict)
    """Number of the device of each volume that is there, by the volume."""
    away: set[str] = field(default_factory=set)
    """Volumes of present disks whose partitions the kernel has not."""
    unreported: set[str] = field(default_factory=set)
    """Volumes that are there, and of which udev has reported nothing."""
    mappings: list[SeenMapping] = field(default_factory=list)
    mounts: list[SeenMount] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    users: dict[str, list[str]] = field(default_factory=dict)
    """Who uses a disk in other ways, by its sequence number."""
    lost: dict[str, list[str]] = field(default_factory=dict)
    """What was written to a volume and is not on its medium, by the volume."""
    offline: set[str] = field(default_factory=set)
    """Disks that answer nothing, by their sequence numbers."""
    foreign: list[str] = field(default_factory=list)
    """Bytes on media that nobody has written to them."""
    missing: list[str] = field(default_factory=list)
    """Bytes that were on media for certain, and are not."""


@dataclass(frozen=True, slots=True)
class Falsehood:
    """Something that is published and is not so, or that must not be."""

    kind: str
    volume: str
    words: str

    def __str__(self) -> str:
        return f"{self.kind} ({self.volume}): {self.words}"


_False = Callable[[str, str], Falsehood]


def falsehoods(claims: list[Claim], system: System) -> list[Falsehood]:
    """Return what is not so of these claims, and what nobody may do to a medium."""
    return [
        *(each for claim in claims for each in _of_claim(claim, system)),
        *_unclaimed(claims, system),
        *(Falsehood("foreign byte", "medium", words) for words in system.foreign),
        *(Falsehood("lost byte", "medium", words) for words in system.missing),
    ]


def _of_claim(claim: Claim, system: System) -> Iterator[Falsehood]:
    def false(kind: str, words: str) -> Falsehood:
        said = f"{claim.state}: {claim.reason}" if claim.reason else claim.state
        return Falsehood(kind, claim.volume, f"{words}; published: {said}")

    is_there = claim.volume in system.media or claim.volume in system.away
    mapping = next((m for m in system.mappings if m.volume == claim.volume), None)
    if "a defect of the agent" in claim.reason:
        yield false("defect", "the agent has a defect")
    waits = claim.state in PASSING and mapping is not None and mapping.is_suspended
    if claim.state in PASSING and not waits:
        yield false("passing state", "nothing is under way")
    if claim.state == "gone":
        yield false("departure", "it is published as gone, and listed")
    if claim.state == "removed-unsafely":
        still_there = ("in the machine's sleep", *LOSS)
        if is_there and not any(words in claim.reason for words in still_there):
            yield false("departure", "it is there")
    elif not is_there:
        yield false("departure", "it is not there")
    if waits:  # as each read of a suspended mapping does, so nothing else is known of it
        return
    if claim.state in ("mounted", "unlocked"):
        yield from _of_held(claim, mapping, system, false)
    else:
        if claim.mapping or claim.point:
            yield false("place", f"it has {claim.mapping or 'no mapping'} at {claim.point}")
        yield from _of_released(claim, mapping, system, false)
    if claim.state == "ejected":
        yield from _of_ejected(claim, system, false)
    is_served = claim.state not in ("waiting", "conflict", "ignored")
    is_believed = is_served and "left alone" not in claim.reason
    if system.lost.get(claim.volume) and is_believed and not claim.says_loss:
        yield false("unsaid loss", f"{', '.join(system.lost[claim.volume])} is lost")


def _of_held(
    claim: Claim, mapping: SeenMapping | None, system: System, false: _False
) -> Iterator[Falsehood]:
    if mapping is None:
        yield false("mapping", "there is no mapping")
        return
    if mapping.name != claim.mapping:
        yield false("mapping", f"it is called {mapping.name}, not {claim.mapping}")
    if mapping.leads_to != system.media.get(claim.volume):
        yield false("table", f"its table is {mapping.table}")
    if mapping.is_suspended and "suspended" not in claim.reason:
        yield false("suspended", f"mapping {mapping.name} is suspended")
    if claim.disk in system.offline and "offline" not in claim.reason:
        yield false("offline", "its disk is offline")
    if claim.state == "unlocked":
        return
    found = [m for m in system.mounts if (m.number, m.point) == (mapping.number, claim.point)]
    if not found:
        yield false("mount", f"it is not mounted at {claim.point}")
    elif claim.read_only not in {mount.read_only for mount in found}:
        yield false("read-only", f"read-only is {not claim.read_only}")
    elif ("read-only" in claim.reason) != claim.read_only:
        yield false("read-only", "its words are others")
    says_hidden, on_top = "hidden by" in claim.reason, [m for m in found if m.is_on_top]
    if found and (says_hidden if len(on_top) == len(found) else not on_top and not says_hidden):
        yield false("hidden", "another mount is seen there, or none")


def _of_released(
    claim: Claim, mapping: SeenMapping | None, system: System, false: _False
) -> Iterator[Falsehood]:
    if mapping is None:
        if "is held open" in claim.reason:
            yield false("holder", "nobody holds its mapping: there is none")
        return
    where = [m.point for m in system.mounts if m.number == mapping.number]
    what = f"mapping {mapping.name} is there ({mapping.table})"
    if claim.state in RELEASED:
        yield false("left over", f"{what}, mounted at {where}")
    elif claim.state == "removed-unsafely":
        if mapping.has_key and claim.volume not in system.media:
            yield false("left over", f"{what} with its key")
    elif not any(words in claim.reason for words in ("mapping", *where)):
        yield false("left over", f"{what}, mounted at {where}, and nothing is said of it")


def _of_ejected(claim: Claim, system: System, false: _False) -> Iterator[Falsehood]:
    held = [m.name for m in system.mappings if m.volume.partition("-")[0] == claim.disk]
    users = [*system.users.get(claim.disk, []), *held]
    if users:
        yield false("ejected", f"its disk is used: {', '.join(users)}")
    there = [v for v in system.media if v.startswith(f"{claim.disk}-") and not v.endswith("-0")]
    if there:
        yield false("ejected", f"the kernel has the partitions {there}")
    lost = [volume for volume in system.lost if volume.partition("-")[0] == claim.disk]
    if lost:
        yield false("ejected", f"{lost} lack what was written to them")


def _unclaimed(claims: list[Claim], system: System) -> Iterator[Falsehood]:
    """Yield what the kernel has of volumes of which nothing is published."""
    published = {claim.volume for claim in claims}
    for volume in set(system.media) - published - system.unreported:
        if not volume.endswith("-0"):
            yield Falsehood("unpublished", volume, "it is there, and nothing is published of it")
    for mapping in system.mappings:
        if mapping.volume in published:
            continue
        if mapping.has_key:
            yield Falsehood(
                "left over", mapping.volume, f"{mapping.name} is there: {mapping.table}"
            )
    for key in system.keys:
        yield Falsehood("key", "keyring", f"{key} is in a keyring")
