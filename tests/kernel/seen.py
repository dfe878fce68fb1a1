"""What the kernel has of media, mappings, mounts and keys, read without the agent's code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence, Set
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fakes.contract import until
from fakes.oracle import Claim, Falsehood, SeenMapping, SeenMount, System
from kernel.agents import keys
from kernel.cartridges import Cartridge
from kernel.gadgets import Reader
from kernel.witness import BLOCKS, attempt

OURS: Final = "CAAM-HOTPLUG-"


@dataclass(frozen=True, slots=True)
class Line:
    """A line of mountinfo, proc_pid_mountinfo(5)."""

    identity: int
    parent: int
    number: str
    point: str
    read_only: bool
    filesystem: str


_errors_before: dict[tuple[int, str], int] = {}
"""Errors that a filesystem had when its mount was seen first; earlier mounts have met them."""


def lines() -> list[Line]:
    """Read mountinfo."""
    found = []
    before = dict(_errors_before)
    _errors_before.clear()
    for text in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, behind = text.partition(" - ")
        identity, parent, number, _, point, options = words.split()[:6]
        filesystem, _, its_options = behind.split()
        read_only = "ro" in (*options.split(","), *its_options.split(","))
        if filesystem == "ext4" and "errors=remount-ro" in its_options:
            errors = _errors(number)
            first = before.get((int(identity), number), errors)
            _errors_before[int(identity), number] = first
            read_only = read_only or errors > first
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
        found.append(Line(int(identity), int(parent), number, point, read_only, filesystem))
    return found


def _errors(number: str) -> int:
    """Return how many errors the ext4 has met, in earlier mounts, too.

    With one more it refuses writes, and kernels need not show that. Source: ext4_emergency_state in
    fs/ext4/ext4.h; Debian's 6.1 leaves SB_RDONLY as it was.
    """
    with suppress(OSError, ValueError):
        device = Path("/sys/dev/block", number).resolve().name
        return int(Path("/sys/fs/ext4", device, "errors_count").read_text())
    return 0


def seen_at(point: str, mounts: list[Line]) -> int:
    """Return the mount ID that a lookup of the path ends in."""
    identities = {mount.identity for mount in mounts}
    (at,) = (m for m in mounts if m.parent not in identities or m.parent == m.identity)
    while True:
        below = [
            mount
            for mount in mounts
            if mount.parent == at.identity != mount.identity and _leads_to(mount.point, point)
        ]
        if not below:
            return at.identity
        at = min(below, key=lambda mount: len(mount.point))


def _leads_to(above: str, point: str) -> bool:
    return point == above or point.startswith(f"{above.rstrip('/')}/")


def mappings() -> list[SeenMapping]:
    """Read the agent's mappings from sysfs and by dmsetup, which hides keys."""
    tables: dict[str, list[str]] = {}
    for line in _tables().splitlines():
        name, _, table = line.partition(": ")
        tables.setdefault(name.removesuffix(":"), []).append(table)
    found = []
    for folder in BLOCKS.glob("dm-*"):
        with suppress(OSError):  # it is just being removed
            name, uuid, suspended = (
                (folder / "dm" / fact).read_text().strip() for fact in ("name", "uuid", "suspended")
            )
            if uuid.startswith(OURS):
                number = (folder / "dev").read_text().strip()
                table = "\n".join(tables.get(name, []))
                volume = uuid.removeprefix(OURS)
                found.append(SeenMapping(name, volume, number, table, 0, suspended == "1"))
    return found


def _tables() -> str:
    """Return all tables; dmsetup fails if a mapping is removed meanwhile."""
    said = ""

    def is_said() -> bool:
        nonlocal said
        done = attempt("dmsetup", "table")
        said = done.stdout
        return done.returncode == 0

    until(is_said)
    return said


class Disks:
    """What there is of media, also under the number that a disk had before it was taken offline.

    The kernel takes an offline disk for one whose medium was changed, and gives it another number
    (sd_check_events in drivers/scsi/sd.c). Both are numbers of the same medium.
    """

    def __init__(self, media: Sequence[Cartridge], reader: Reader) -> None:
        self._media = media
        self._reader = reader
        self._numbers: dict[int, list[str]] = {}
        """All numbers of a disk, by the inode of its folder."""
        self._read_under: dict[int, str] = {}
        """Number under which a partition of the reader was seen first, by its folder's inode."""
        self._labels: dict[str, str] = {}
        """Labels of media, by the numbers of their disks."""

    def label_of(self, volume: str) -> str:
        """Return the label of the medium that has, or had, this volume; empty if unknown."""
        return self._labels.get(volume.partition("-")[0], "")

    def label_below(self, mappings: Sequence[SeenMapping]) -> str:
        """Return the label of the medium that one of the mappings leads to; empty if none does."""
        system = self.system(frozenset())
        below = {mapping.leads_to for mapping in mappings}
        found = (volume for volume, number in system.media.items() if number in below)
        return next(map(self.label_of, found), "")

    def note_card(self) -> dict[str, str]:
        """Return the numbers of the reader's devices, by the names of its volumes.

        A partition of the card before, which the kernel keeps while it is in use, is none of them.
        This is called before a card is changed, too: nothing else tells whose partition it is.
        """
        found: dict[str, str] = {}
        with suppress(OSError, ValueError):  # its port is off, or it is just being removed
            disk, diskseq = self._reader.disk, ""
            while diskseq != (diskseq := (disk / "diskseq").read_text().strip()):
                partitions = list(disk.glob(f"{disk.name}[0-9]*"))  # of this card, if it stays
            found[f"{diskseq}-0"] = (disk / "dev").read_text().strip()
            for partition in partitions:
                if self._read_under.setdefault(partition.stat().st_ino, diskseq) == diskseq:
                    card = self._reader.card
                    self._labels.setdefault(diskseq, card.label if card else "")
                    number = (partition / "partition").read_text().strip()
                    found[f"{diskseq}-{number}"] = (partition / "dev").read_text().strip()
        return found

    def has_number_of_before(self, claims: Sequence[Claim]) -> Iterator[Falsehood]:
        """Yield what is published under a number that a disk had before it was offline."""
        now = {medium.label: self.volumes_of(medium) for medium in self._media}
        for claim in claims:
            volumes = now.get(self.label_of(claim.volume), {})
            if volumes and f"{claim.disk}-0" not in volumes:
                words = f"its disk has the volumes {sorted(volumes)}"
                yield Falsehood("number", claim.volume, words)

    def unread(self, claims: Sequence[Claim]) -> Iterator[Falsehood]:
        """Yield the reader's card if the kernel could read it, and nobody has it do so."""
        volumes = self.note_card()
        is_ejected = any(c.state == "ejected" and f"{c.disk}-0" in volumes for c in claims)
        if self._reader.card is None or len(volumes) != 1 or is_ejected:
            return
        with suppress(OSError, ValueError):
            disk = self._reader.disk
            kept = disk.glob(f"{disk.name}[0-9]*/holders/*")
            if not any(kept):
                words = f"{self._reader.card.label} is in it, and was not read"
                yield Falsehood("unread card", disk.name, words)

    def volumes_of(self, medium: Cartridge, published: Set[str] = frozenset()) -> dict[str, str]:
        """Return the numbers of the devices of a medium, by the names of its volumes."""
        found: dict[str, str] = {}
        with suppress(OSError, ValueError):  # it is out, or just being removed
            disk = medium.disk
            diskseq = (disk / "diskseq").read_text().strip()
            earlier = self._numbers.setdefault(disk.stat().st_ino, [])
            if diskseq not in earlier:
                earlier.append(diskseq)
                self._labels[diskseq] = medium.label
            named = (number for number in reversed(earlier) if f"{number}-0" in published)
            diskseq = next(named, diskseq)
            found[f"{diskseq}-0"] = (disk / "dev").read_text().strip()
            for partition in disk.glob(f"{disk.name}[0-9]*"):
                number = (partition / "partition").read_text().strip()
                found[f"{diskseq}-{number}"] = (partition / "dev").read_text().strip()
        return found

    def system(self, published: Set[str]) -> System:
        """Read what the kernel has. `published`: volumes that the agent names."""
        mounts, found = lines(), System(mappings=mappings(), keys=keys())
        for medium in self._media:
            volumes = self.volumes_of(medium, published)
            if is_offline(medium):  # nobody can read the partitions that are not served already
                volumes = {v: n for v, n in volumes.items() if v in published or v.endswith("-0")}
            _add(volumes, found)
            if is_offline(medium):
                found.offline |= {volume.partition("-")[0] for volume in volumes}
        _add(self.note_card(), found)
        numbers = {mapping.number for mapping in found.mappings}
        found.mounts = [
            SeenMount(m.number, m.point, m.read_only, seen_at(m.point, mounts) == m.identity)
            for m in mounts
            if m.number in numbers
        ]
        return found


def _add(volumes: dict[str, str], found: System) -> None:
    found.media |= volumes
    if len(volumes) == 1:
        (disk,) = volumes
        found.away.add(f"{disk.removesuffix('-0')}-1")


def is_offline(medium: Cartridge) -> bool:
    """Whether the kernel has given up the medium's disk."""
    with suppress(OSError, ValueError):
        return (medium.disk / "device/state").read_text().strip() == "offline"
    return False


def outside(medium: Cartridge) -> bytes:
    """Return the bytes of the medium before and behind its partition."""
    disk = medium.disk
    (partition,) = disk.glob(f"{disk.name}[0-9]*")
    start, size = (int((partition / fact).read_text()) * 512 for fact in ("start", "size"))
    file = os.open(f"/dev/{disk.name}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        whole = int((disk / "size").read_text()) * 512
        return os.pread(file, start, 0) + os.pread(file, whole - start - size, start + size)
    finally:
        os.close(file)
