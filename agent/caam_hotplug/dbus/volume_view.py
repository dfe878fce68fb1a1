"""A volume as the agent shows it on the bus, and which one somebody means."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from caam_hotplug.errors import HotplugError, shown

_LEFT: Final = "removed-unsafely"
_NOT_OURS: Final = {"ignored", _LEFT}


@dataclass(frozen=True, slots=True)
class ShownVolume:
    """What the agent says of one volume; the names of the fields are the keys of `--json`."""

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
    steps_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_properties(cls, properties: Mapping[str, Any]) -> ShownVolume:
        """`properties`: by their D-Bus names. What this program does not know is passed over."""
        return cls(**{_FIELDS[name]: properties[name] for name in _FIELDS if name in properties})

    @property
    def called(self) -> str:
        """The label, or the device where there is none."""
        return shown(self.label or self.device)

    @property
    def where(self) -> str:
        """Where it is mounted and how; else why it is in its state."""
        if not self.mount_point:
            return shown(self.reason)
        how = ", ".join(filter(None, [self.filesystem, "read-only" if self.read_only else ""]))
        return shown(f"{self.mount_point} ({how})" if how else self.mount_point)

    @property
    def said(self) -> str:
        """State and circumstances, in one line."""
        return f"{shown(self.state)}: {self.where}" if self.where else shown(self.state)


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
    "Steps": "steps_s",
}


def chosen(text: str, volumes: Mapping[str, ShownVolume], what: str) -> str:
    """The key of the one volume that the text means.

    `text`: its exact label, its device by any of its names, or its mount point. `what`: for whom,
    such as `eject`.

    Raises: HotplugError if none is meant, or more than one.
    """
    # A path first: anybody can write a label that looks like one.
    matching = _at(text, volumes) if "/" in text else []
    if not matching:
        matching = [key for key, volume in volumes.items() if volume.label == text != ""]
        # What has left shares its label with the medium that came in its place, and so may media
        # that are none of the agent's.
        matching = (
            [key for key in matching if volumes[key].state not in _NOT_OURS]
            or [key for key in matching if volumes[key].state != _LEFT]
            or matching
        )
    match matching:
        case [one]:
            return one
        case []:
            raise HotplugError(f"{what} {shown(text)}: {_none(text, list(volumes.values()))}")
        case _:
            which = ", ".join(sorted(shown(volumes[key].device) for key in matching))
            raise HotplugError(
                f"{what} {shown(text)}: {len(matching)} volumes have this label; "
                f"name the device: {which}"
            )


def _at(path: str, volumes: Mapping[str, ShownVolume]) -> list[str]:
    here = {os.path.abspath(path), os.path.realpath(path)}  # noqa: PTH100  pathlib keeps `..`
    return [
        key
        for key, volume in volumes.items()
        if here & {volume.device, volume.mount_point, volume.mapping_device} - {""}
        and volume.state != _LEFT
    ]


def _none(text: str, volumes: Sequence[ShownVolume]) -> str:
    parts = [v for v in volumes if v.partition and v.state not in _NOT_OURS]
    on_disk = [v.device for v in parts if "/" in text and v.device.startswith(text)]
    if on_disk:
        return f"is not a volume itself; name the partition: {', '.join(map(shown, on_disk))}"
    there = ", ".join(v.called for v in volumes if v.state not in _NOT_OURS)
    return f"no such volume; there are: {there}" if there else "no such volume; there are no media"
