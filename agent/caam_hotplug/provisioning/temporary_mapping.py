"""Mappings that a command makes for itself over a disk that it holds; gone when it ends."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.config.rules import KeySource
from caam_hotplug.errors import DmError, MappingBusyError
from caam_hotplug.formats import blobs, crypt_table
from caam_hotplug.formats.crypt_table import Crypt
from caam_hotplug.kernel import devmapper, disks, keyring
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.keys import loading
from caam_hotplug.model import Mapping, Sectors, Volume

Purpose = Literal["provision", "migrate-from", "migrate-to"]

_PURPOSES: Final[tuple[Purpose, ...]] = ("provision", "migrate-from", "migrate-to")


def _dm_uuid(disk: Volume, purpose: Purpose) -> str:
    return f"{names.COMMAND_DM_UUID_PREFIX}{purpose}-{disk.id.diskseq}"


@contextmanager
def mapping(disk: Volume, purpose: Purpose) -> Iterator[str]:
    """The name of a mapping without a table; it is gone on the way out, or at its last close.

    Raises: MappingBusyError if somebody still has it open.
    """
    name, uuid = f"{names.DM_NAME_PREFIX}{purpose}-{disk.id.diskseq}", _dm_uuid(disk, purpose)
    try:
        devmapper.create(name, uuid)
        yield name
    finally:
        if devmapper.find(uuid) is not None:  # else the name is that of another
            devmapper.remove(name)
    if devmapper.find(uuid) is not None:
        hint = "another program has it open; the same command goes on once that has ended"
        raise MappingBusyError("remove mapping", name, errno.EBUSY, hint)


def load(
    name: str,
    volume: Volume,
    key: KeySource,
    crypt: Crypt,
    blob: blobs.Blob,
    *,
    start: Sectors,
    directory: Path,
) -> None:
    """The mapping has the table of the volume, which starts there on its disk, and the blob's key.

    `volume` has the disk's number, since the kernel need not know the partition yet. `directory`
    has the blob of the key's master. Raises: CaamError; KeyringError; DmError; HotplugError.
    """
    description = f"{names.KEY_PREFIX}{name}"
    host = LinuxKernel(directory, names.MOUNT_ROOT)
    try:
        loaded = loading.load(host, blob, key, description)
        target = crypt_table.crypt_target(volume, crypt, loaded)
        target = replace(
            target,
            key_description=f"{loaded.type}:{description}",
            offset=start + crypt.offset,
        )
        devmapper.load(name, target.to_line(), read_only=False)
    finally:
        keyring.unlink_key(description)


def activate(name: str, hold: disks.Held, purpose: Purpose) -> Mapping:
    """The mapping is live, and lies on the very medium that is held. Raises: HotplugError."""
    # The table has the disk open by now: should the medium change, it does not lead to the next.
    hold.require_same(hold.reading)
    devmapper.resume(name)
    found = devmapper.find(_dm_uuid(hold.disk, purpose))
    if found is None:
        raise DmError("find mapping", name, errno.ENXIO)
    return found


def remove_leftovers(disk: Volume) -> None:
    """No mapping is left of a run that was killed, on this disk or on one that has gone."""
    there = disks.diskseqs() - {disk.id.diskseq}
    of_others = {
        f"{names.COMMAND_DM_UUID_PREFIX}{purpose}-{seq}" for purpose in _PURPOSES for seq in there
    }
    for found in devmapper.ours(names.COMMAND_DM_UUID_PREFIX):
        if found.uuid not in of_others:
            devmapper.remove(found.name)
