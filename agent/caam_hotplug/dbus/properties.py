"""The properties of the objects on the bus, and where their values come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sdbus import DbusPropertyConstFlag, DbusPropertyEmitsChangeFlag

from caam_hotplug import __version__
from caam_hotplug.errors import shown
from caam_hotplug.model import SECTOR_BYTES

_U32: Final = 2**32 - 1
_U64: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class Property:
    """A property of an object: its type, and how its value is read."""

    signature: str
    value: Callable[[Any], Any]
    flags: int = DbusPropertyEmitsChangeFlag


VOLUME: Final[Mapping[str, Property]] = {
    "Label": Property("s", lambda entry: shown(entry.volume.partlabel or "")),
    "PartUuid": Property("s", lambda entry: shown(entry.volume.partuuid or "")),
    "Device": Property("s", lambda entry: shown(entry.volume.node), DbusPropertyConstFlag),
    "DiskSeq": Property(
        "t", lambda entry: min(entry.volume.id.diskseq, _U64), DbusPropertyConstFlag
    ),
    "Partition": Property(
        "u", lambda entry: min(entry.volume.id.partition, _U32), DbusPropertyConstFlag
    ),
    "Rule": Property("s", lambda entry: shown(entry.rule)),
    "State": Property("s", lambda entry: entry.state.value),
    "StateReason": Property("s", lambda entry: shown(entry.reason)),
    "MountPoint": Property("s", lambda entry: shown(entry.mount_point)),
    "MappingDevice": Property("s", lambda entry: shown(entry.mapping_node)),
    "Filesystem": Property("s", lambda entry: shown(entry.filesystem)),
    "Size": Property("t", lambda entry: min(entry.volume.size * SECTOR_BYTES, _U64)),
    "ReadOnly": Property("b", lambda entry: entry.read_only),
    "Since": Property("t", lambda entry: _microseconds(entry.since)),
    # Not signalled: it changes whenever somebody reads.
    "ObservedAt": Property("t", lambda entry: _microseconds(entry.observed_at), 0),
    "StepDurations": Property(
        "a{sd}", lambda entry: {shown(step): float(took) for step, took in entry.steps.items()}
    ),
}
MANAGER: Final[Mapping[str, Property]] = {
    "Version": Property("s", lambda _registry: __version__, DbusPropertyConstFlag),
    # Changes are not signalled: each comes with a change of state, which is.
    "Counters": Property("a{st}", lambda registry: dict(registry.counters), 0),
}


def _microseconds(seconds: float) -> int:
    return int(min(max(0, seconds * 1e6), _U64))


def values_of(properties: Mapping[str, Property], subject: object) -> dict[str, Any]:
    """Return the properties' values for an entry or for the status registry."""
    return {name: shape.value(subject) for name, shape in properties.items()}
