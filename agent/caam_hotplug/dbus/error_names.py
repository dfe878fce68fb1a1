"""The D-Bus names and texts of the agent's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from caam_hotplug import errors, names
from caam_hotplug.errors import HotplugError, VolumeBusyError, shown


class ArgumentsError(HotplugError):
    """The arguments of a call have the right types and the wrong values."""


class NotPermittedError(HotplugError):
    """The caller may read, but not make this request."""


ERROR_NAMES: Final[Mapping[type[Exception], str]] = {
    ArgumentsError: "org.freedesktop.DBus.Error.InvalidArgs",
    NotPermittedError: "org.freedesktop.DBus.Error.AccessDenied",
    HotplugError: f"{names.BUS_ERROR_PREFIX}Failed",
    errors.ConfigError: f"{names.BUS_ERROR_PREFIX}Configuration",
    errors.UnsafePathError: f"{names.BUS_ERROR_PREFIX}UnsafePath",
    errors.UnfitFileError: f"{names.BUS_ERROR_PREFIX}UnfitFile",
    errors.UnsupportedVolumeError: f"{names.BUS_ERROR_PREFIX}UnsupportedVolume",
    errors.DeviceInUseError: f"{names.BUS_ERROR_PREFIX}DeviceInUse",
    errors.DeviceLockedError: f"{names.BUS_ERROR_PREFIX}DeviceLocked",
    errors.BlobError: f"{names.BUS_ERROR_PREFIX}Blob",
    errors.BlobMissingError: f"{names.BUS_ERROR_PREFIX}BlobMissing",
    errors.MasterKeyError: f"{names.BUS_ERROR_PREFIX}MasterKey",
    errors.BlobRejectedError: f"{names.BUS_ERROR_PREFIX}BlobRejected",
    errors.NoFilesystemError: f"{names.BUS_ERROR_PREFIX}NoFilesystem",
    errors.ReleaseError: f"{names.BUS_ERROR_PREFIX}Release",
    errors.RequestRefusedError: f"{names.BUS_ERROR_PREFIX}RequestRefused",
    errors.SuspendedError: f"{names.BUS_ERROR_PREFIX}Suspended",
    errors.WritesLostError: f"{names.BUS_ERROR_PREFIX}WritesLost",
    errors.VolumeBusyError: f"{names.BUS_ERROR_PREFIX}VolumeBusy",
    errors.ForeignMappingError: f"{names.BUS_ERROR_PREFIX}ForeignMapping",
    errors.MountPointOccupiedError: f"{names.BUS_ERROR_PREFIX}MountPointOccupied",
    errors.KernelError: f"{names.BUS_ERROR_PREFIX}Kernel",
    errors.MediumGoneError: f"{names.BUS_ERROR_PREFIX}MediumGone",
    errors.UnknownError: f"{names.BUS_ERROR_PREFIX}Unknown",
    errors.CaamError: f"{names.BUS_ERROR_PREFIX}Caam",
    errors.KeyringError: f"{names.BUS_ERROR_PREFIX}Keyring",
    errors.DmError: f"{names.BUS_ERROR_PREFIX}DeviceMapper",
    errors.MappingBusyError: f"{names.BUS_ERROR_PREFIX}MappingBusy",
    errors.MountError: f"{names.BUS_ERROR_PREFIX}Mount",
    errors.FlushError: f"{names.BUS_ERROR_PREFIX}Flush",
    errors.MountBusyError: f"{names.BUS_ERROR_PREFIX}MountBusy",
    OSError: f"{names.BUS_ERROR_PREFIX}Failed",
}
"""D-Bus name of each error. A class without one has the name of its base."""


def error_name(error: Exception) -> str:
    """Return the D-Bus name of the error, or of its nearest base class that has one."""
    return next(ERROR_NAMES[kind] for kind in type(error).__mro__ if kind in ERROR_NAMES)


def error_text(error: Exception) -> str:
    """Return the error's message as a D-Bus string; each holder of a volume has a line."""
    text = str(error)
    if isinstance(error, VolumeBusyError) and error.holders:
        before = text.removesuffix("; ".join(error.holders)).rstrip()
        return "\n".join(shown(line) for line in (before, *error.holders))
    return "\n".join(shown(line) for line in text.split("\n"))
