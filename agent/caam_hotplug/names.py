"""Names that other programs see, each spelled once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from caam_hotplug.model import VolumeId

PROGRAM: Final = "caam-hotplug"

CONFIG_FILE: Final = Path("/etc/caam-hotplug/agent.toml")
RULES_DIRECTORY: Final = "rules.d"
"""Directory of the drop-ins, beside the configuration file."""

BLOB_DIRECTORY: Final = Path("/data/caam")
"""Directory in which NXP's caam-keygen keeps keys and blobs."""
MOUNT_ROOT: Final = Path("/run/media")

CAAM_DEVICE: Final = Path("/dev/caam-keygen")
HOLDERS_SOCKET: Final = Path("/run/caam-hotplug/holders")
"""Socket of the program that may look into other processes and says who uses a volume."""
HAND_OVER: Final = Path("/run/caam-hotplug/hand-over")
"""Mark of an upgrade of the package: the agent that stops leaves media mounted for the next one."""
UDEV_CONTROL: Final = Path("/run/udev/control")

DM_UUID_PREFIX: Final = "CAAM-HOTPLUG-"
"""Prefix of a DM-UUID; libdevmapper has the subsystem that owns the mapping there."""
DM_NAME_PREFIX: Final = "caam-"
KEY_PREFIX: Final = "caam-hotplug:"
"""Prefix of a logon key's description, which must have one and a colon (keyrings(7))."""

COMMAND_DM_UUID_PREFIX: Final = "CAAM-COMMAND-"
"""Prefix for mappings of commands; the agent would adopt or release one with its own prefix."""

UNFINISHED_TYPE: Final = "08852176-76a2-4897-9536-c3c5c588df44"
"""Partition type of a medium that `provision` or `migrate` has begun and not finished."""


@dataclass(frozen=True, slots=True)
class TestNames:
    """Prefixes of a test mapping and its parts, before the process's number. No volume has them."""

    program: str

    @property
    def uuid(self) -> str:
        """Of the DM-UUID; the udev rule has it, too."""
        return f"CAAM-{self.program.upper()}-"

    @property
    def dm_name(self) -> str:
        """Of the mapping's name."""
        return f"caam-{self.program}-"

    @property
    def key(self) -> str:
        """Of the key's description."""
        return f"caam-{self.program}:"

    @property
    def memory(self) -> str:
        """Whole: of the memory below the mapping."""
        return f"caam-{self.program}"


DOCTOR: Final = TestNames("doctor")
BENCH: Final = TestNames("bench")
"""Of measurements, see tools/measure."""

SERVICE_UNIT: Final = f"{PROGRAM}.service"
SOCKET_UNIT: Final = f"{PROGRAM}.socket"
HOLDERS_UNIT: Final = f"{PROGRAM}-holders.socket"

MOUNT_POINT_MODE: Final = 0o500
"""Mode of a mount point that the agent made. It tells the agent's directories from the board's own
after a crash. Nobody writes into the directory while nothing is mounted there."""
OWN_PATH_MODE: Final = 0o1500
"""As MOUNT_POINT_MODE, at a path of its own. A board's directory may have mode 0500 there; nobody
makes one sticky that nobody may write to."""

UDEV_OPT_OUT: Final = "CAAM_HOTPLUG"
"""udev property that a board's rule sets to 0 to keep the agent off a device."""
UDEV_DISKSEQ: Final = "CAAM_HOTPLUG_DISKSEQ"
"""udev property that our rule sets, with the insertion that the other properties are of."""

OPERATORS: Final = "caam-hotplug"
"""Group whose members may request over D-Bus all that root may."""
BUS_NAME: Final = "org.caamhotplug1"
BUS_PATH: Final = "/org/caamhotplug1"
BUS_MANAGER: Final = "org.caamhotplug1.Manager"
BUS_VOLUME: Final = "org.caamhotplug1.Volume"
BUS_ERROR_PREFIX: Final = "org.caamhotplug1.Error."

NAME_MAX_LENGTH: Final = 36
"""Longest partition label that a GPT can hold, in UTF-16 units."""
RENDERED_MAX_LENGTH: Final = 90
"""Longest name from a template; with prefix and volume it fits the 127 characters of a DM name."""
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def dm_uuid(volume: VolumeId) -> str:
    """Spell the DM-UUID of a volume's mapping: the agent's prefix, then the volume."""
    return f"{DM_UUID_PREFIX}{volume}"


def volume_of_dm_uuid(uuid: str) -> VolumeId | None:
    """Read the volume from a DM-UUID; None if the mapping is not the agent's."""
    from caam_hotplug.model import VolumeId  # noqa: PLC0415  a command that starts has no use for it

    if not uuid.startswith(DM_UUID_PREFIX):
        return None
    return VolumeId.from_text(uuid.removeprefix(DM_UUID_PREFIX))


def dm_name(volume: VolumeId, mount_name: str) -> str:
    """Spell the DM name, unique to the insertion: a holder may still pin an earlier one."""
    return f"{DM_NAME_PREFIX}{mount_name}-{volume}"


def key_description(volume: VolumeId) -> str:
    """Spell the description of the volume's key."""
    return f"{KEY_PREFIX}{volume}"


def bus_path(volume: VolumeId) -> str:
    """Spell the D-Bus path of a volume's object, in which no hyphen may stand."""
    return f"{BUS_PATH}/volumes/{volume.diskseq}_{volume.partition}"


def is_path(place: str) -> bool:
    """Whether a mount point has a path of its own; else it is a name in the mount root."""
    return place.startswith("/")


def name_of(place: str) -> str:
    """Return the name that the mount point has in its directory."""
    return place.rpartition("/")[2]


def are_nested(place: str, other: str) -> bool:
    """Whether the mount points are the same, or one of them lies below the other."""
    return f"{place}/".startswith(f"{other}/") or f"{other}/".startswith(f"{place}/")


def why_unsafe(name: str) -> str | None:
    """Say why a text must not become part of a path; None if it may.

    An attacker may have written labels and serial numbers. No other check stands between them and
    a file name.
    """
    if not name:
        return "it is empty"
    if len(name) > NAME_MAX_LENGTH:
        return f"it is longer than {NAME_MAX_LENGTH} characters"
    if name[0] in ".-":
        return f"it starts with {name[0]!r}"
    if not _NAME.fullmatch(name):
        return "it has characters other than A-Z a-z 0-9 . _ -"
    return None


def is_partition_of(name: str, disk: str) -> bool:
    """Whether a device's name is that of a partition of the disk (disk_name in block/genhd.c)."""
    number = name.removeprefix(disk)
    if disk[-1:].isdigit():
        number = number.removeprefix("p") if number.startswith("p") else ""
    return name.startswith(disk) and number.isdecimal()
