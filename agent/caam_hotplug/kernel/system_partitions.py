"""Whether a partition is the running system's, also while nothing has it mounted."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Final

from caam_hotplug.errors import DeviceInUseError, shown
from caam_hotplug.kernel import mountinfo
from caam_hotplug.kernel.table_entry import TableEntry
from caam_hotplug.model import DeviceNumber, Volume

_Facts = Mapping[str, str | None]
"""Labels and identifiers, by the tags of fstab(5)."""

_COMMAND_LINE: Final = Path("/proc/cmdline")
_PARAMETERS: Final = ("root", "mount.usr", "resume")
_FSTAB: Final = Path("/etc/fstab")
_SYSTEMS_OWN: Final = tuple(map(PurePosixPath, ("/boot", "/efi", "/usr", "/var", "/etc")))
_LOADER: Final = Path(
    "/sys/firmware/efi/efivars/LoaderDevicePartUUID-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
)
"""The partition that the boot loader was read from (systemd, "The Boot Loader Interface")."""
_ATTRIBUTES_BYTES: Final = 4
"""Before the value of an EFI variable (Documentation/filesystems/efivarfs.rst)."""


def require_not_the_systems(partition: Volume, entry: TableEntry, blobs: Path) -> None:
    """Require that the system neither boots from the partition nor mounts it as a part of itself.

    `partition`: with its labels and identifiers as they are on the disk. `blobs`: the blob
    directory, which is to lie elsewhere, too. Raises: DeviceInUseError.
    """
    facts = {
        "UUID": partition.uuid,
        "LABEL": partition.label,
        "PARTUUID": entry.uuid,
        "PARTLABEL": entry.name,
    }
    for why in _reasons(partition, entry, facts, blobs):
        raise DeviceInUseError(f"use {partition.node}: it is the system's own: {why}")


def require_not_a_systems_name(label: str) -> None:
    """Require that the system finds no part of itself by that partition label.

    Of two partitions of one label, whichever comes first is taken. A filesystem's label is another:
    by that, fstab may mount what is unlocked. Raises: DeviceInUseError.
    """
    for why in _users({"PARTLABEL": label}, None, None):
        raise DeviceInUseError(f"use label {label!a}: the system has it: {why}; choose another")


def _reasons(partition: Volume, entry: TableEntry, facts: _Facts, blobs: Path) -> Iterator[str]:
    if entry.boots:
        yield entry.boots
    yield from _users(facts, partition.number, blobs)
    if _loaders_partition() == entry.uuid.lower():
        yield "the boot loader was read from it"


def _users(facts: _Facts, number: DeviceNumber | None, blobs: Path | None) -> Iterator[str]:
    """Yield where the system names what has these labels and identifiers, or this number."""
    for parameter, _, value in (word.partition("=") for word in _text(_COMMAND_LINE).split()):
        if parameter in _PARAMETERS and _names(value, facts, number):
            yield f"the kernel's command line has {shown(f'{parameter}={value}')}"
    for line in _text(_FSTAB).splitlines():
        fields = [mountinfo.unescaped(field) for field in line.split()]  # as in fstab(5)
        if len(fields) > 1 and _is_systems(fields[1], blobs) and _names(fields[0], facts, number):
            yield f"{_FSTAB} mounts it at {shown(fields[1])}"


def _names(source: str, facts: _Facts, number: DeviceNumber | None) -> bool:
    """Whether the text is one by which mount(8) or the kernel finds the partition."""
    tag, is_tag, value = source.partition("=")
    value = value.strip("\"'")
    if is_tag and facts.get(tag):
        return (facts[tag] or "").lower() == value.lower()
    if not source.startswith("/dev/"):  # another path may lead to a filesystem that hangs
        return False
    try:
        status = Path(source).stat()
    except (OSError, ValueError):
        return False
    found = DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))
    return stat.S_ISBLK(status.st_mode) and found == number


def _is_systems(point: str, blobs: Path | None) -> bool:
    path = PurePosixPath(point)
    above = () if blobs is None else (blobs, *blobs.parents)
    return (
        point == "/"
        or path in map(PurePosixPath, above)
        or any(path == own or own in path.parents for own in _SYSTEMS_OWN)
    )


def _loaders_partition() -> str | None:
    try:
        content = _LOADER.read_bytes()[_ATTRIBUTES_BYTES:]
    except OSError:
        return None
    return content.decode("utf-16-le", errors="replace").rstrip("\0").lower()


def _text(file: Path) -> str:
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
