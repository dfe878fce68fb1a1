"""A volume as the agent shows it on the bus, and the selection of one by a text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from caam_hotplug.errors import HotplugError, shown

_REMOVED: Final = "removed-unsafely"
_NOT_SERVED: Final = {"ignored", _REMOVED}
_HELD: Final = {"mounted", "unlocked"}
_LOOKED_AT_ONCE_US: Final = 1_000_000
"""Reads cause at most one look in this time."""


@dataclass(frozen=True, slots=True)
class ShownVolume:
    """The published properties of a volume; the names of the fields are the keys of `--json`."""

    label: str = ""
    part_uuid: str = ""
    device: str = ""
    diskseq: int = 0
    partition: int = 0
    rule: str = ""
    state: str = ""
    reason: str = ""
    mount_point: str = ""
    mapping_device: str = ""
    filesystem: str = ""
    size_bytes: int = 0
    read_only: bool = False
    since_us: int = 0
    observed_us: int = 0
    steps_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> ShownVolume:
        """Make one from properties by their D-Bus names; unknown ones are ignored."""
        return cls(**{_FIELDS[name]: properties[name] for name in _FIELDS if name in properties})

    @property
    def display_name(self) -> str:
        """The label, or the device if there is no label."""
        return shown(self.label or self.device)

    def may_be_out_of_date(self, now_us: int) -> bool:
        """Whether the agent holds it, and has not looked at it for more than a second."""
        is_held = self.state in _HELD and self.observed_us > 0  # an older agent has no such time
        return is_held and now_us - self.observed_us > _LOOKED_AT_ONCE_US

    @property
    def mount_or_reason(self) -> str:
        """The mount point, how it is mounted, and what else is so; else the reason of the state."""
        if not self.mount_point or self.state == "unlocked":
            return shown(self.reason)
        how = ", ".join(filter(None, [self.filesystem, "read-only" if self.read_only else ""]))
        where = f"{self.mount_point} ({how})" if how else self.mount_point
        return shown("; ".join([where, *self.reason.split("; ")[1:]]))

    @property
    def status_text(self) -> str:
        """State and mount point, or state and reason, in one line."""
        return (
            f"{shown(self.state)}: {self.mount_or_reason}"
            if self.mount_or_reason
            else shown(self.state)
        )


_FIELDS: Final = {
    "Label": "label",
    "PartUuid": "part_uuid",
    "Device": "device",
    "DiskSeq": "diskseq",
    "Partition": "partition",
    "Rule": "rule",
    "State": "state",
    "StateReason": "reason",
    "MountPoint": "mount_point",
    "MappingDevice": "mapping_device",
    "Filesystem": "filesystem",
    "Size": "size_bytes",
    "ReadOnly": "read_only",
    "Since": "since_us",
    "ObservedAt": "observed_us",
    "StepDurations": "steps_s",
}


def select(text: str, volumes: Mapping[str, ShownVolume], what: str) -> str:
    """Return the key of the one volume that the text names.

    `text`: the exact label, any path of the device, or the mount point. `what`: the command, with
    which errors begin.

    Raises: HotplugError if the text names no volume, or more than one.
    """
    # Paths come first, since anybody can write a label that looks like a path.
    matching = _by_path(text, volumes) if "/" in text else []
    if not matching:
        matching = [key for key, volume in volumes.items() if volume.label == text != ""]
    # A volume that was removed may have the label, or the device, of the one that was put in after
    # it. So may media that the agent does not serve.
    matching = (
        [key for key in matching if volumes[key].state not in _NOT_SERVED]
        or [key for key in matching if volumes[key].state != _REMOVED]
        or matching
    )
    match matching:
        case [one]:
            return one
        case []:
            raise HotplugError(f"{what} {shown(text)}: {_why_none(text, list(volumes.values()))}")
        case _:
            which = ", ".join(sorted(shown(volumes[key].device) for key in matching))
            raise HotplugError(
                f"{what} {shown(text)}: {len(matching)} volumes have this label; "
                f"name the device: {which}"
            )


def _by_path(path: str, volumes: Mapping[str, ShownVolume]) -> list[str]:
    paths = {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100  pathlib keeps `..`
    return [
        key
        for key, volume in volumes.items()
        if paths & {volume.device, volume.mount_point, volume.mapping_device} - {""}
    ]


def _why_none(text: str, volumes: Sequence[ShownVolume]) -> str:
    parts = [v for v in volumes if v.partition and v.state not in _NOT_SERVED]
    on_disk = [v.device for v in parts if "/" in text and v.device.startswith(text)]
    if on_disk:
        return f"it is not a volume; name the partition: {', '.join(map(shown, on_disk))}"
    there = ", ".join(v.display_name for v in volumes if v.state not in _NOT_SERVED)
    return f"no such volume; there are: {there}" if there else "no such volume; there are no media"
