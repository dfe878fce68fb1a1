"""A partition's entry in the table of a disk in use, and why it must not be changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from caam_hotplug.errors import UnsupportedVolumeError
from caam_hotplug.kernel.partition_table import Place


@dataclass(frozen=True, slots=True)
class TableEntry:
    """A partition's entry, spelled as udev spells it."""

    place: Place
    type: str
    """A GUID in a GPT; such as `0x83` in an MBR."""
    name: str
    """Empty in an MBR."""
    uuid: str
    boots: str = ""
    """Why the system needs the partition at boot; empty if the table does not say so."""


def refused(node: str, why: str) -> UnsupportedVolumeError:
    """Return the error for a table that is not changed."""
    return UnsupportedVolumeError(f"change the partition table of {node}: {why}")


def was_changed(node: str) -> UnsupportedVolumeError:
    """Return the error for a table that is not as it was read or written."""
    return refused(
        node, "another program changes it at the same time; try again when that has ended"
    )


def chosen(entries: Sequence[TableEntry], place: Place, node: str) -> TableEntry:
    """Return the entry of the partition that the kernel has at the place, and nothing else there.

    Raises: UnsupportedVolumeError.
    """
    found = next((each for each in entries if each.place.number == place.number), None)
    if found is None or found.place != place:
        raise refused(
            node,
            f"the kernel has partition {place.number} at sector {place.start} with {place.size} "
            "sectors, and the table does not; reboot, or have the kernel read the table again",
        )
    for other in entries:
        if other != found and _overlap(other.place, place):
            raise refused(
                node,
                f"partitions {place.number} and {other.place.number} overlap; what is written to "
                "one would be lost in the other",
            )
    return found


def _overlap(one: Place, other: Place) -> bool:
    return one.start < other.start + other.size and other.start < one.start + one.size
