"""The plan that migrates a medium, and its text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from caam_hotplug.config.rules import Rule
from caam_hotplug.errors import shown
from caam_hotplug.formats import blobs, crypt_table, recovery_files
from caam_hotplug.kernel import gpt
from caam_hotplug.keys import backends, store
from caam_hotplug.model import SECTOR_BYTES, Volume
from caam_hotplug.provisioning import migration_journal
from caam_hotplug.provisioning.migration_stage import FoundMigration, Stage
from caam_hotplug.provisioning.options import MigrateOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationPlan:
    """The steps to take, and everything that they rely on."""

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
    stage: Stage
    migration: FoundMigration
    """What earlier runs have left."""
    filesystem: str | None = None
    """The filesystem under the old key. None if an earlier run has begun."""
    recovery: store.FoundRecovery | None = None
    """The recovery file that was there before."""

    @property
    def label(self) -> str:
        """The label of the finished medium."""
        head = self.migration.head
        return self.entry.identity.name if head is None else head.name

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

    def about(self, identifier: str) -> recovery_files.About:
        """Describe the medium, as in the new recovery file with this identifier."""
        crypt, kind = self.rule.crypt, blobs.KEY_TYPES[self.options.method.backend]
        cipher = crypt_table.cipher_for(crypt, kind)
        return recovery_files.About(
            self.label, cipher, crypt.sector_size, self.filesystem or "", identifier
        )

    def lines(self) -> Iterator[str]:
        """Yield the plan as text: a heading, then the steps."""
        medium = f"{self.volume.node}: {shown(self.label)}"
        to = blobs.key_of(self.options.method.backend)
        match self.stage:
            case Stage.BEGIN:
                before = blobs.key_of(blobs.backend_of(self.old))
                yield f"{medium} would move from {before} to {to} in these steps:"
            case Stage.CONTINUE:
                yield f"{medium} was begun before, and would be finished in these steps:"
            case Stage.DONE:
                yield f"{medium} has {to} already"
        for step in self._steps():
            yield f"- {step}"

    def _steps(self) -> Iterator[str]:
        found = self.migration
        if found.unused is not None:
            journal = migration_journal.file(self.directory, found.unused)
            yield f"remove {shown(journal)}, of a run that did not touch the medium"
        if self.stage is Stage.DONE:
            return
        megabytes = self.entry.length * SECTOR_BYTES / 1e6
        if found.head is None:
            yield from self._begin_steps()
            yield f"encrypt all {megabytes:.0f} MB anew: {self.settings}"
        else:
            yield (
                f"go on by {shown(migration_journal.file(self.directory, found.head))}: "
                f"{found.moved_bytes / 1e6:.0f} of {megabytes:.0f} MB are under the new key"
            )
        before = blobs.backend_of(self.old)
        yield f"keep the old blob as {shown(f'{self.blob_file}.{before}')}"
        yield f"write the new blob to {shown(self.blob_file)}"
        yield f"give the partition its label {shown(self.label)} and its type back"
        yield "remove the journal"

    def _begin_steps(self) -> Iterator[str]:
        options, file = self.options, self.options.recovery_file
        if file is None:
            yield f"make a key of {options.key_bytes} bytes"
        elif self.recovery is None:
            yield f"make a key of {options.key_bytes} bytes, and write it to {shown(file)}"
        else:
            yield f"read the key from {shown(file)}, of a run that was interrupted"
        yield f"seal the key as {blobs.key_of(options.method.backend)}"
        yield f"write a journal to {shown(self.directory)}, with both blobs"
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
