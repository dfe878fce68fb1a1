"""Every name that others see, spelled once."""

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
"""Drop-ins, in a folder of this name beside the configuration file."""

BLOB_DIRECTORY: Final = Path("/data/caam")
"""Where NXP's caam-keygen keeps keys and blobs."""
MOUNT_ROOT: Final = Path("/run/media")

CAAM_DEVICE: Final = Path("/dev/caam-keygen")
HOLDERS_SOCKET: Final = Path("/run/caam-hotplug/holders")
"""Where a program with the right to look into other processes answers who uses a volume."""
UDEV_CONTROL: Final = Path("/run/udev/control")

DM_UUID_PREFIX: Final = "CAAM-HOTPLUG-"
"""libdevmapper's convention: a DM-UUID starts with the subsystem that owns the mapping."""
DM_NAME_PREFIX: Final = "caam-"
KEY_PREFIX: Final = "caam-hotplug:"
"""A logon key's description must start with a prefix and a colon (keyrings(7))."""

COMMAND_DM_UUID_PREFIX: Final = "CAAM-COMMAND-"
"""Of what a command makes for itself; the agent would adopt or sweep what has its own prefix."""

UNFINISHED_TYPE: Final = "08852176-76a2-4897-9536-c3c5c588df44"
"""The partition type of a medium that `provision` or `migrate` has begun and not finished."""


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
"""Of measurements, such as tests/bench/throughput.py."""

SERVICE_UNIT: Final = f"{PROGRAM}.service"
SOCKET_UNIT: Final = f"{PROGRAM}.socket"
HOLDERS_UNIT: Final = f"{PROGRAM}-holders.socket"

MOUNT_POINT_MODE: Final = 0o500
"""The mode of a directory that we made. It tells ours from the board's own after a crash, and
nobody writes into it while nothing is mounted there."""

UDEV_OPT_OUT: Final = "CAAM_HOTPLUG"
"""A udev property: a board's rule that sets it to 0 keeps the agent off that device."""

OPERATORS: Final = "caam-hotplug"
"""The group whose members may ask for what root may, over D-Bus."""
BUS_NAME: Final = "org.caamhotplug1"
BUS_PATH: Final = "/org/caamhotplug1"
BUS_MANAGER: Final = "org.caamhotplug1.Manager"
BUS_VOLUME: Final = "org.caamhotplug1.Volume"
BUS_ERROR_PREFIX: Final = "org.caamhotplug1.Error."

NAME_MAX_LENGTH: Final = 36
"""GPT's own limit for a partition label, in UTF-16 units."""
RENDERED_MAX_LENGTH: Final = 90
"""With prefix, sequence number and partition it still fits a DM name's 127 characters."""
PLAIN_TEXT: Final = re.compile(r"[A-Za-z0-9._-]*")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")


def dm_uuid(volume: VolumeId) -> str:
    """The DM-UUID of a volume's mapping: ours by its prefix, its owner by the rest."""
    return f"{DM_UUID_PREFIX}{volume}"


def volume_of_dm_uuid(uuid: str) -> VolumeId | None:
    """The volume that a DM-UUID names, or None if the mapping is not ours."""
    from caam_hotplug.model import VolumeId  # noqa: PLC0415  a command that starts has no use for it

    if not uuid.startswith(DM_UUID_PREFIX):
        return None
    return VolumeId.from_text(uuid.removeprefix(DM_UUID_PREFIX))


def dm_name(volume: VolumeId, mount_name: str) -> str:
    """The DM name: unique to the insertion, since a holder may still pin an earlier one."""
    return f"{DM_NAME_PREFIX}{mount_name}-{volume}"


def key_description(volume: VolumeId) -> str:
    """The description of the volume's logon key."""
    return f"{KEY_PREFIX}{volume}"


def bus_path(volume: VolumeId) -> str:
    """The D-Bus path of a volume's object; a hyphen may not stand in one."""
    return f"{BUS_PATH}/volumes/{volume.diskseq}_{volume.partition}"


def why_unsafe(name: str) -> str | None:
    """Why a text must not become part of a path, or None if it may.

    Labels and serial numbers are an attacker's text; this is the only gate between them and a
    file name.
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
