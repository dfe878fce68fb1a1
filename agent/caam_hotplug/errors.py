"""Everything the agent raises on purpose: one hierarchy.

A message says operation, subject and cause, and what to do where that is known. No message
carries key material.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


class HotplugError(Exception):
    """Something refused, in words for the reader of the journal."""


def shown(text: object) -> str:
    """The text as a line of a message: escaped where a terminal would act on it or not show it."""
    plain = str(text)
    return plain if plain.isprintable() else ascii(plain)


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """One thing wrong in a configuration file."""

    file: Path
    key_path: str
    """Where in the file, such as `rule[1].match.partlabel`; empty for the file as a whole."""
    problem: str
    """What was found, what was expected, and a suggestion where there is one."""

    def __str__(self) -> str:
        place = f"{shown(self.file)}: {self.key_path}" if self.key_path else shown(self.file)
        return f"{place}: {self.problem}"


class ConfigError(HotplugError):
    """A configuration that was refused whole, with every fault found in it."""

    def __init__(self, faults: list[ConfigFault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


class UnsafePathError(HotplugError):
    """Someone other than root could lead this path elsewhere, or change what lies there."""

    def __init__(self, path: Path, component: Path, cause: str, remedy: str) -> None:
        super().__init__(f"open {shown(path)}: {shown(component)} {cause}; {remedy}")
        self.component = component
        """Which part of the path it is."""
        self.cause = cause
        self.remedy = remedy


class UnfitFileError(HotplugError):
    """A file is of a kind or a size that is not read; the message says which."""


class UnsupportedVolumeError(HotplugError):
    """The volume asks for something that would harm it, such as an IV that wraps."""


class DeviceInUseError(HotplugError):
    """Something else uses the volume; who, is in the words."""


class DeviceLockedError(DeviceInUseError):
    """A program has the whole disk to itself, and udev waits for its end as well."""


class BlobError(HotplugError):
    """The black blob's file cannot be taken: its kind, size or form."""


class BlobMissingError(BlobError):
    """There is no blob of that name (yet)."""


class BlobRejectedError(HotplugError):
    """The CAAM refused the black blob: damaged, or sealed on another chip."""


class MasterKeyError(HotplugError):
    """The trusted key that others are encrypted under is missing, or of another board."""


class NoFilesystemError(HotplugError):
    """Nothing known lies under this key: a wrong key, or a medium that was never formatted."""


class ReleaseError(HotplugError):
    """Something of ours could not be let go; the next start of the agent tries again."""


class RequestRefusedError(HotplugError):
    """What was asked of a volume cannot be done as it is; the words say why and what to do."""


_HOLDERS_TOLD = 32


class VolumeBusyError(RequestRefusedError):
    """Somebody uses the volume, and its rule says that it is not taken from them."""

    def __init__(self, what: str, holders: tuple[str, ...]) -> None:
        told = holders[:_HOLDERS_TOLD]
        if len(holders) > len(told):
            told += (f"and {len(holders) - len(told)} more",)
        who = "; ".join(told) or "by whom cannot be told from here"
        super().__init__(f"{what} is in use: {who}")
        self.holders = told
        """Who, a text each."""


class ForeignMappingError(HotplugError):
    """A mapping bears our name or UUID but is not what we would have made."""


class MountPointOccupiedError(HotplugError):
    """The mount point exists with content, or something else is mounted there."""


class KernelError(HotplugError, OSError):
    """A kernel call, or the library in front of it, failed.

    `str()` is `OPERATION SUBJECT: strerror (detail)`, the detail being the kernel's or the
    library's own words.
    """

    def __init__(self, operation: str, subject: str, errno: int, detail: str = "") -> None:
        OSError.__init__(self, errno, os.strerror(errno))
        self.operation = operation
        self.subject = subject
        self.detail = detail

    def __str__(self) -> str:
        words = f"{self.operation} {self.subject}: {self.strerror}"
        return f"{words} ({self.detail})" if self.detail else words


class CaamError(KernelError):
    """The CAAM's device refused a call for a reason other than the blob."""


class KeyringError(KernelError):
    """A keyring call failed."""


class DmError(KernelError):
    """A device-mapper call failed."""


class MappingBusyError(DmError):
    """The mapping is held open."""


class MountError(KernelError):
    """A step of mounting or unmounting failed."""


class MountBusyError(MountError):
    """Something still uses the mount."""
