"""The medium that is pulled: what the machine has of it, and who uses it."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import shown
from caam_hotplug.kernel import device_users, mountinfo, open_files, sysfs
from caam_hotplug.model import DeviceNumber, Volume
from measure.machine import read_text
from measure.replug.slot import Slot
from measure.running import MeasureError

BLOCKS: Final = Path("/sys/class/block")


@dataclass(frozen=True, slots=True)
class Medium:
    """The medium as it is there now; each time it comes it is another one to the kernel."""

    volume: Volume
    disk: str
    mapping: str
    """Such as dm-0."""
    point: str

    @classmethod
    def find(cls, name: str, point: str) -> Medium:
        """Look at the medium of the kernel's name, mounted at the point.

        Raises: MeasureError; OSError.
        """
        volume = sysfs.volume_at(name, {}, "kernel")
        above = list((BLOCKS / name / "holders").iterdir()) if volume else []
        if volume is None or len(above) != 1:
            raise MeasureError(f"{shown(name)} has gone; plug it in and try again")
        disk = sysfs.disk_name(name) if volume.id.partition else name
        return cls(volume, disk, above[0].name, point)

    def parts(self) -> dict[str, Callable[[], bool]]:
        """For each part of it, how to ask whether it has gone.

        Some are announced by nothing, or before their end.
        """
        key = names.key_description(self.volume.id)
        return {
            "unmounted": lambda: not is_mounted(self.point),
            "mapping gone": lambda: not (BLOCKS / self.mapping).exists(),
            "key gone": lambda: not has_key(Path("/proc/keys").read_text(errors="replace"), key),
            "mount point gone": lambda: not is_mounted(self.point) and not _is_ours(self.point),
        }

    def require_unused(self, slot: Slot | None) -> None:
        """Refuse a medium that anybody uses, or with which something else would go.

        Raises: MeasureError; DeviceInUseError.
        """
        users = [*self._openers(), *self._mounts(), *self._loops(), *self._neighbours(slot)]
        if users:
            raise MeasureError(
                f"{self.volume.node} cannot be pulled, because it is in use: {'; '.join(users)}; "
                "end that first"
            )

    def _openers(self) -> Iterator[str]:
        mapping = BLOCKS / self.mapping
        number = DeviceNumber.from_text((mapping / "dev").read_text())
        found = open_files.search({number: read_text(mapping / "dm/name") or ""})
        # The agent holds the mapping open itself, to see failed writes.
        yield from (str(holder) for holder in found if holder.command != "caam-hotplug")

    def _mounts(self) -> Iterator[str]:
        """Mounts inside it, and its own at other places."""
        mounts, below = mountinfo.mounts(), f"{self.point}/"
        sources = {mount.source for mount in mounts if mount.point == self.point}
        for mount in mounts:
            is_elsewhere = mount.source in sources and mount.point != self.point
            if mount.point.startswith(below) or is_elsewhere:
                yield f"there is a mount at {shown(mount.point)}"

    def _loops(self) -> Iterator[str]:
        for file in BLOCKS.glob("loop*/loop/backing_file"):
            if (read_text(file) or "").startswith(f"{self.point}/"):
                yield f"{file.parts[-3]} is backed by a file on it"

    def _neighbours(self, slot: Slot | None) -> Iterator[str]:
        """Other disks in its slot. Raises: DeviceInUseError for a used partition beside it."""
        for other in sysfs.there():
            if other.id.diskseq == self.volume.id.diskseq:
                if other.id.partition not in {0, self.volume.id.partition}:
                    device_users.require_unused(other)
            elif slot and (BLOCKS / other.name).resolve().is_relative_to(slot.folder):
                yield f"{other.node} would go as well"


def is_mounted(point: str) -> bool:
    """Is anything mounted there?"""
    return any(mount.point == point for mount in mountinfo.mounts())


def _is_ours(point: str) -> bool:
    """Is the directory one that the agent creates and removes? Others stay."""
    try:
        return stat.S_IMODE(Path(point).stat().st_mode) == names.MOUNT_POINT_MODE
    except FileNotFoundError:
        return False


def has_key(listed: str, description: str) -> bool:
    """Does /proc/keys list the key? Unused ones await their collector (security/keys/gc.c)."""
    lines = (line.split(None, 8) for line in listed.splitlines())
    return any(of[2] != "0" and of[8].startswith(f"{description}: ") for of in lines)
