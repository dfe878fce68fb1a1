"""The plan that migrates a medium, and its text."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from caam_hotplug.config.rules import Rule
from caam_hotplug.errors import shown
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.kernel import disks, gpt
from caam_hotplug.keys import backends, store
from caam_hotplug.model import SECTOR_BYTES, Mapping, Volume
from caam_hotplug.provisioning import migration_journal, temporary_mapping
from caam_hotplug.provisioning.migration_stage import Begun, Untouched
from caam_hotplug.provisioning.options import MigrateOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class MediumToMigrate:
    """The medium as it was found, and the key that it is to get."""

    options: MigrateOptions
    directory: Path
    """The blob directory."""
    disk: Volume
    volume: Volume
    """The partition."""
    entry: gpt.Entry
    rule: Rule
    blob_name: str
    old: blobs.Blob
    """The blob of the key that the medium has, or had when it was begun."""
    found: Untouched | Begun
    """What earlier runs have done."""

    @property
    def label(self) -> str:
        """The label of the finished medium."""
        match self.found:
            case Begun(head=head):
                return head.name
        return self.entry.identity.name

    @property
    def blob_file(self) -> Path:
        """The path of the medium's blob."""
        return self.directory / self.blob_name

    @property
    def method(self) -> backends.SealMethod:
        """How the new key is sealed, with the rule's options for the trust source."""
        method = self.options.method
        return replace(method, options="" if method.backend == "tagged" else self.rule.key.options)

    @property
    def data_start_bytes(self) -> int:
        """Where the encrypted data begins on the disk."""
        return (self.entry.start + self.rule.crypt.offset) * SECTOR_BYTES

    @property
    def settings(self) -> str:
        """How the rule encrypts the medium before and afterwards."""
        after = self.options.method.backend
        return settings_of(self.rule, blobs.backend_of(self.old), after)

    @property
    def on_disk(self) -> Volume:
        """The partition as a part of its disk, from its own start on."""
        return replace(self.disk, size=self.entry.length)

    def through_key(
        self, hold: disks.Held, purpose: temporary_mapping.Purpose, blob: blobs.Blob
    ) -> AbstractContextManager[Mapping]:
        """Map the partition under a blob's key while the context is open. Raises: HotplugError."""
        return temporary_mapping.through_key(
            hold, purpose, self.entry, rule=self.rule, blob=blob, directory=self.directory
        )

    def about(self, filesystem: str, identifier: str) -> recovery_files.About:
        """Describe the medium, as in the new recovery file with this identifier."""
        crypt, kind = self.rule.crypt, blobs.KEY_TYPES[self.options.method.backend]
        cipher = crypt_table.cipher_for(crypt, kind)
        return recovery_files.About(self.label, cipher, crypt.sector_size, filesystem, identifier)


@dataclass(frozen=True, slots=True)
class NewKey:
    """Facts that a new key needs, read if no run has begun."""

    filesystem: str
    """The filesystem under the old key."""
    recovery: store.FoundRecovery | None
    """The recovery file that was there before."""


@dataclass(frozen=True, slots=True)
class MigrationPlan:
    """The steps to take, and everything that they rely on."""

    medium: MediumToMigrate
    work: Begun | NewKey | None
    """The migration to go on with or to begin. None if the medium has such a key already."""

    def lines(self) -> Iterator[str]:
        """Yield the plan as text: a heading, then the steps."""
        medium = self.medium
        name, to = f"{medium.volume.node}: {shown(medium.label)}", medium.options.method.backend
        match self.work:
            case None:
                yield f"{name} has {blobs.key_of(to)} already"
            case Begun():
                yield f"{name} was begun before, and would be finished in these steps:"
            case NewKey():
                before = blobs.key_of(blobs.backend_of(medium.old))
                yield f"{name} would move from {before} to {blobs.key_of(to)} in these steps:"
        for step in self._steps():
            yield f"- {step}"

    def _steps(self) -> Iterator[str]:
        medium = self.medium
        megabytes = medium.entry.length * SECTOR_BYTES / 1e6
        match medium.found:
            case Untouched(unused=unused) if unused is not None:
                journal = migration_journal.file(medium.directory, unused)
                yield f"remove {shown(journal)}, of a run that did not touch the medium"
        match self.work:
            case None:
                return
            case Begun(head=head, moved_bytes=moved):
                yield (
                    f"go on by {shown(migration_journal.file(medium.directory, head))}: "
                    f"{moved / 1e6:.0f} of {megabytes:.0f} MB are under the new key"
                )
            case NewKey() as new:
                yield from self._key_steps(new)
                yield f"encrypt all {megabytes:.0f} MB anew: {medium.settings}"
        before = blobs.backend_of(medium.old)
        yield f"keep the old blob as {shown(f'{medium.blob_file}.{before}')}"
        yield f"write the new blob to {shown(medium.blob_file)}"
        yield f"give the partition its label {shown(medium.label)} and its type back"
        yield "remove the journal"

    def _key_steps(self, new: NewKey) -> Iterator[str]:
        options, file = self.medium.options, self.medium.options.recovery_file
        if file is None:
            yield f"make a key of {options.key_bytes} bytes"
        elif new.recovery is None:
            yield f"make a key of {options.key_bytes} bytes, and write it to {shown(file)}"
        else:
            yield f"read the key from {shown(file)}, of a run that was interrupted"
        yield f"seal the key as {blobs.key_of(options.method.backend)}"
        yield f"write a journal to {shown(self.medium.directory)}, with both blobs"
        yield "mark the partition as not finished"


def settings_of(rule: Rule, before: blobs.Backend, after: blobs.Backend) -> str:
    """Return how the rule encrypts the medium before and afterwards, as the journal has it."""
    crypt = rule.crypt
    ciphers = " to ".join(
        crypt_table.cipher_for(crypt, blobs.KEY_TYPES[backend]) for backend in (before, after)
    )
    flags = ",".join(sorted(crypt.flags))
    return (
        f"{ciphers}, sector_size {crypt.sector_size}, offset {crypt.offset}, "
        f"iv_offset {crypt.iv_offset}, flags [{flags}]"
    )
