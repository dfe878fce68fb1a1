"""How far earlier runs of `provision` have come, read off the blob directory and the medium.

    blob of the label           medium                          this run
    none, or not settled yet    as it was, or half a table      begins
    there                       marked for exactly that blob    goes on
    there                       the label, and a filesystem     finds it finished
                                under the blob's key

Where blob and medium do not belong together, the run begins, too. Then a settled blob is in the
way, and so is any content of the medium unless it may be erased.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import BlobError, BlobRejectedError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blkid, disks, gpt
from caam_hotplug.keys import store
from caam_hotplug.provisioning import marked_partition, medium_content, temporary_mapping
from caam_hotplug.provisioning.options import ProvisionOptions


@dataclass(frozen=True, slots=True)
class FoundKeys:
    """The blob and the recovery file that were there before."""

    blob: store.FoundBlob
    recovery: store.FoundRecovery | None

    def marks(self, label: str, blob: blobs.Blob) -> frozenset[UUID]:
        """Return the marks of a medium that was begun with these keys, or with the blob alone."""
        recovery_id = None if self.recovery is None else self.recovery.id
        return frozenset(
            marked_partition.mark_of(label, each, blob) for each in (None, recovery_id)
        )


@dataclass(frozen=True, slots=True)
class EarlierRun:
    """The work of earlier runs that this one goes on with."""

    entry: gpt.Entry
    """The medium's partition."""
    blob: blobs.Blob
    """The blob that the medium relies on."""
    is_finished: bool


@dataclass(frozen=True, slots=True)
class FoundMedium:
    """What the medium holds."""

    earlier: EarlierRun | None = None
    content: str | None = None
    """The content that would be erased. None if the medium reads as blank."""


def find_keys(options: ProvisionOptions, directory: Path) -> FoundKeys:
    """Read blob and recovery file. Raises: HotplugError if the latter is another medium's."""
    blob = store.find_blob(directory, options.blob_name)
    file, recovery = options.recovery_file, None
    if file is not None:
        recovery = store.find_recovery(file, options.about, options.key_bytes)
    return FoundKeys(blob, recovery)


def examine(
    options: ProvisionOptions, hold: disks.Held, keys: FoundKeys, config: Config
) -> FoundMedium:
    """Read the earlier runs' work, or the content, off the medium. Raises: HotplugError."""
    entries, blob = gpt.read(hold.reading, hold.disk.node), keys.blob.blob
    if entries is not None and len(entries) == 1:
        entry, identity = entries[0], entries[0].identity
        mark = marked_partition.mark_in(entry)
        if mark is not None:
            if blob is not None and mark in keys.marks(options.label, blob):
                return FoundMedium(EarlierRun(entry, blob, is_finished=False))
            return FoundMedium(content=marked_partition.described(identity.name))
        is_named = (identity.type, identity.name) == (marked_partition.LINUX_DATA, options.label)
        directory = config.blob_directory
        if is_named and blob is not None and _is_finished(options, hold, entry, blob, directory):
            return FoundMedium(EarlierRun(entry, blob, is_finished=True))
    return FoundMedium(content=medium_content.of(hold, config))


def _is_finished(
    options: ProvisionOptions,
    hold: disks.Held,
    entry: gpt.Entry,
    blob: blobs.Blob,
    directory: Path,
) -> bool:
    """Whether the filesystem lies on the partition, under the key of the label's blob."""
    try:
        with temporary_mapping.through_key(
            hold, "provision", entry, rule=options.rule, blob=blob, directory=directory
        ) as mapping:
            return blkid.probe(mapping.node, [options.filesystem]) is not None
    except (BlobError, BlobRejectedError):
        return False
