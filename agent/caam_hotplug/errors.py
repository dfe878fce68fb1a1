"""All errors that the agent raises on purpose, in one hierarchy.

A message says operation, subject and cause, and what to do where that is known. No message
carries key material.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final


class HotplugError(Exception):
    """A refusal or failure, in words for the reader of the journal."""

    exit_status: ClassVar[int] = 1
    """That of a command which it ends."""


def shown(text: object) -> str:
    """Escape the text where a terminal would act on it, or not show it."""
    plain = str(text)
    return plain if plain.isprintable() else ascii(plain)


@dataclass(frozen=True, slots=True)
class ConfigFault:
    """A mistake in a configuration file."""

    file: Path
    key_path: str
    """Place in the file, such as `rule[1].match.partlabel`; empty for the file as a whole."""
    problem: str
    """The found value, the expected one, and a suggestion where there is one."""

    def __str__(self) -> str:
        place = f"{shown(self.file)}: {self.key_path}" if self.key_path else shown(self.file)
        return f"{place}: {self.problem}"


class ConfigError(HotplugError):
    """The configuration is refused as a whole, for the faults found in it."""

    def __init__(self, faults: list[ConfigFault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults


class UnsafePathError(HotplugError):
    """Another user than root could lead this path elsewhere, or change the file at its end."""

    def __init__(self, path: Path, component: Path, cause: str, remedy: str) -> None:
        super().__init__(f"open {shown(path)}: {shown(component)} {cause}; {remedy}")
        self.component = component
        """The part of the path that is unsafe."""
        self.cause = cause
        self.remedy = remedy


class UnfitFileError(HotplugError):
    """A file has a kind or size that the agent does not read; the message says which."""


class UnsupportedVolumeError(HotplugError):
    """The volume would be harmed, such as by an IV that wraps."""


class DeviceInUseError(HotplugError):
    """Another user has the volume; the message names it."""


class DeviceLockedError(DeviceInUseError):
    """A program has locked the whole disk, and udev waits for it as well."""


class BlobError(HotplugError):
    """The file is no usable blob: its kind, size or form is wrong."""


class BlobMissingError(BlobError):
    """No blob of that name exists yet."""


class BlobRejectedError(HotplugError):
    """The CAAM refused the black blob: it is damaged, or sealed on another chip."""


class MasterKeyError(HotplugError):
    """The trusted key that encrypts other keys is missing, or belongs to another board."""


class NoFilesystemError(HotplugError):
    """The key shows no known filesystem: it is wrong, or the medium was never formatted."""


BLOB_AT_FAULT: Final = (BlobError, BlobRejectedError, MasterKeyError, NoFilesystemError)
"""Errors that another blob may end."""


class ReleaseError(HotplugError):
    """A resource of the agent could not be released; the next start tries again."""


class RequestRefusedError(HotplugError):
    """The volume's state does not allow the request; the message says why and what to do."""


class SuspendedError(RequestRefusedError):
    """A mapping is suspended, so that reads and writes of it wait."""


class WritesLostError(RequestRefusedError):
    """Not all that was written to the volume has reached its medium."""


_MAX_HOLDERS = 32
_CURES = {
    errno.EMFILE: "raise LimitNOFILE= of the service",
    errno.ENFILE: "raise the sysctl fs.file-max",
    errno.ENOMEM: "the system is short of memory",
    errno.EACCES: "the log of the security module may say more",
}


class VolumeBusyError(RequestRefusedError):
    """Others use the volume, or its disk, and it is not taken from them."""

    def __init__(self, what: str, holders: tuple[str, ...]) -> None:
        named = holders[:_MAX_HOLDERS]
        if len(holders) > len(named):
            named += (f"and {len(holders) - len(named)} more",)
        who = "; ".join(named) or "by a process that is not visible from here"
        super().__init__(f"{what} is in use: {who}")
        self.what = what
        self.holders = named
        """A text for each process, mount or device."""


class ForeignMappingError(HotplugError):
    """A mapping has a name or UUID of the agent, but a table that the agent would not load."""


class MountPointOccupiedError(HotplugError):
    """The mount point has content, or another mount."""


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


class MediumGoneError(HotplugError):
    """The medium went while an operation was under way, so its next step was not taken."""


class UnknownError(KernelError):
    """The kernel did not say whether something is there. So nothing is done that needs to know."""

    def __init__(self, operation: str, subject: str, errno: int, detail: str = "") -> None:
        super().__init__(operation, subject, errno, detail or _CURES.get(errno, ""))


_PASSING = frozenset({errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EINTR})


def is_passing(error: BaseException) -> bool:
    """Return whether the error says nothing about its subject, so that another attempt may do."""
    cause = error.__cause__
    if isinstance(error, UnknownError) or (isinstance(error, OSError) and error.errno in _PASSING):
        return True
    return cause is not None and is_passing(cause)


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


class FlushError(MountError):
    """It is not known whether all that was written has reached the medium."""


class MountBusyError(MountError):
    """Something still uses the mount."""
