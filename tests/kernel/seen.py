"""What the kernel has of media, mappings, mounts and keys, read without the agent's code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fakes.oracle import SeenMapping, SeenMount, System
from kernel.agents import keys
from kernel.cartridges import Cartridge
from kernel.witness import BLOCKS, run

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


def lines() -> list[Line]:
    """Read mountinfo."""
    found = []
    for text in Path("/proc/self/mountinfo").read_text().splitlines():
        words, _, behind = text.partition(" - ")
        identity, parent, number, _, point, options = words.split()[:6]
        filesystem, _, its_options = behind.split()
        read_only = "ro" in (*options.split(","), *its_options.split(","))
        point = re.sub(r"\\(\d{3})", lambda match: chr(int(match[1], 8)), point)
        found.append(Line(int(identity), int(parent), number, point, read_only, filesystem))
    return found


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
    for line in run("dmsetup", "table").splitlines():
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


def volumes_of(medium: Cartridge) -> dict[str, str]:
    """Return the numbers of the devices of a medium, by the names of its volumes."""
    found: dict[str, str] = {}
    with suppress(OSError, ValueError):  # it is out, or just being removed
        disk = medium.disk
        diskseq = (disk / "diskseq").read_text().strip()
        found[f"{diskseq}-0"] = (disk / "dev").read_text().strip()
        for partition in disk.glob(f"{disk.name}[0-9]*"):
            number = (partition / "partition").read_text().strip()
            found[f"{diskseq}-{number}"] = (partition / "dev").read_text().strip()
    return found


def system(media: Iterable[Cartridge]) -> System:
    """Read all of it."""
    mounts, found = lines(), System(mappings=mappings(), keys=keys())
    for medium in media:
        volumes = volumes_of(medium)
        found.media |= volumes
        if len(volumes) == 1:
            (disk,) = volumes
            found.away.add(f"{disk.removesuffix('-0')}-1")
        with suppress(OSError, ValueError):
            if (medium.disk / "device/state").read_text().strip() == "offline":
                found.offline |= {volume.partition("-")[0] for volume in volumes}
    numbers = {mapping.number for mapping in found.mappings}
    found.mounts = [
        SeenMount(m.number, m.point, m.read_only, seen_at(m.point, mounts) == m.identity)
        for m in mounts
        if m.number in numbers
    ]
    return found


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
