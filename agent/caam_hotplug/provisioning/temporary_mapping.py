"""Temporary mappings over a disk that a command holds. They end with the command."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final, Literal

from caam_hotplug import names
from caam_hotplug.config.rules import Rule
from caam_hotplug.errors import DmError, HotplugError, MappingBusyError
from caam_hotplug.formats import blobs, crypt_table
from caam_hotplug.kernel import devmapper, disks, gpt, keyring
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.keys import backends
from caam_hotplug.model import Mapping, Sectors, Volume

Purpose = Literal["provision", "migrate-from", "migrate-to"]

_PURPOSES: Final[tuple[Purpose, ...]] = ("provision", "migrate-from", "migrate-to")


@contextmanager
def through_key(
    hold: disks.Held,
    purpose: Purpose,
    entry: gpt.Entry,
    *,
    rule: Rule,
    blob: blobs.Blob,
    directory: Path,
) -> Iterator[Mapping]:
    """Map a partition under a blob's key while the context is open.

    The mapping lies on the whole disk, since the kernel need not know the partition yet.
    `directory` has the blob of the key's master. Raises: HotplugError.
    """
    with _mapping(hold.disk, purpose) as name:
        volume = replace(hold.disk, size=entry.length)
        _load(name, volume, entry.start, rule=rule, blob=blob, directory=directory)
        yield _activate(name, hold, purpose)


def try_blob(
    volume: Volume,
    purpose: Purpose,
    start: Sectors,
    *,
    rule: Rule,
    blob: blobs.Blob,
    directory: Path,
) -> None:
    """Check that the kernel takes the rule's cipher with the blob's key. Nothing is mapped.

    Raises: CaamError; KeyringError; DmError; HotplugError.
    """
    with _mapping(volume, purpose) as name:
        _load(name, volume, start, rule=rule, blob=blob, directory=directory)


def try_method(
    volume: Volume,
    purpose: Purpose,
    start: Sectors,
    *,
    rule: Rule,
    method: backends.SealMethod,
    key_bytes: int,
    directory: Path,
) -> blobs.Blob:
    """Check that this board can seal such a key and encrypt with it. Return the test key's blob.

    The key is forgotten, and the blob is not stored. Raises: as `try_blob`.
    """
    test_key = backends.seal(method, key_bytes, directory)
    blob = blobs.parse(test_key, method.backend)
    try_blob(volume, purpose, start, rule=rule, blob=blob, directory=directory)
    return blob


def require_no_leftovers(disk: Volume) -> None:
    """Check that no killed run left a mapping on this disk. Raises: HotplugError."""
    for purpose in _PURPOSES:
        found = devmapper.find(_dm_uuid(disk, purpose))
        if found is not None:
            raise HotplugError(
                f"check {disk.node} without a change: mapping {found.name} of a run that was "
                f"killed lies on it; `dmsetup remove {found.name}` removes it, and so does a run "
                "without --dry-run"
            )


def remove_leftovers(disk: Volume) -> None:
    """Remove mappings that a killed run left on this disk, or on disks that are gone."""
    there = disks.diskseqs() - {disk.id.diskseq}
    of_others = {
        f"{names.COMMAND_DM_UUID_PREFIX}{purpose}-{seq}" for purpose in _PURPOSES for seq in there
    }
    for found in devmapper.ours(names.COMMAND_DM_UUID_PREFIX):
        if found.uuid not in of_others:
            devmapper.remove(found.name)


def _dm_uuid(disk: Volume, purpose: Purpose) -> str:
    return f"{names.COMMAND_DM_UUID_PREFIX}{purpose}-{disk.id.diskseq}"


@contextmanager
def _mapping(disk: Volume, purpose: Purpose) -> Iterator[str]:
    """Create a mapping without a table; yield its name, and remove it at the end.

    Raises: MappingBusyError if another program still has it open; it goes with the last close.
    """
    name, uuid = f"{names.DM_NAME_PREFIX}{purpose}-{disk.id.diskseq}", _dm_uuid(disk, purpose)
    try:
        devmapper.create(name, uuid)
        yield name
    finally:
        if devmapper.find(uuid) is not None:  # else the name belongs to another mapping
            devmapper.remove(name)
    if devmapper.find(uuid) is not None:
        hint = "another program has it open; the same command goes on once that has ended"
        raise MappingBusyError("remove mapping", name, errno.EBUSY, hint)


def _load(
    name: str,
    volume: Volume,
    start: Sectors,
    *,
    rule: Rule,
    blob: blobs.Blob,
    directory: Path,
) -> None:
    """Load the table of a volume that starts there on its disk. The key leaves the keyring."""
    description = f"{names.KEY_PREFIX}{name}"
    host = LinuxKernel(directory, names.MOUNT_ROOT)
    try:
        loaded = backends.load(host, blob, rule.key, description)
        target = crypt_table.crypt_target(volume, rule.crypt, loaded)
        target = replace(
            target,
            key_description=f"{loaded.type}:{description}",
            offset=start + rule.crypt.offset,
        )
        devmapper.load(name, target.to_line(), read_only=False)
    finally:
        keyring.unlink_key(description)


def _activate(name: str, hold: disks.Held, purpose: Purpose) -> Mapping:
    """Activate the loaded table. Raises: HotplugError if the medium was changed."""
    # From the load on, the table has the disk open. Should the medium change now, the table does
    # not lead to the next medium.
    hold.require_same(hold.reading)
    devmapper.resume(name)
    found = devmapper.find(_dm_uuid(hold.disk, purpose))
    if found is None:
        raise DmError("find mapping", name, errno.ENXIO)
    return found
