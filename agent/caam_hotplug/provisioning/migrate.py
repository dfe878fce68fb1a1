"""Migrate a medium to a key of another kind. A second run goes on after an interruption.

First the plan is made. Carrying it out begins with a journal, a file beside the blobs that has both
of them. The journal is on the board's disk before the medium is touched. Then the partition gets a
mark: a type that no rule matches, and an identifier that only this journal has. Then all bytes move
from key to key (`reencryption`). Last, the new blob takes the place of the old one, which is kept
under another name; the partition gets its identity back; and the journal is removed.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import BlobMissingError, HotplugError, UnsupportedVolumeError, shown
from caam_hotplug.formats import blobs, crypt_table
from caam_hotplug.kernel import atomic_files, blob_files, disks
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.keys import backends, store
from caam_hotplug.model import SECTOR_BYTES, Mapping
from caam_hotplug.provisioning import (
    checks,
    marked_partition,
    medium_blocks,
    migration_journal,
    reencryption,
)
from caam_hotplug.provisioning.migration_plan import MediumToMigrate, MigrationPlan, NewKey
from caam_hotplug.provisioning.migration_planning import entry_of, held_medium, plan_migration
from caam_hotplug.provisioning.migration_stage import Begun, Untouched
from caam_hotplug.provisioning.options import MigrateOptions, Progress

Count = Callable[[int, int], None]
"""Called with the bytes that are under the new key, and the whole medium's."""


@dataclass(frozen=True, slots=True)
class MigrateResult:
    """The medium as it is now."""

    node: str
    label: str
    blob: Path
    kept: Path | None
    """The old blob. None if the medium had a key of that kind before."""
    recovery_file: Path | None


def migrate(
    options: MigrateOptions, config: Config, progress: Progress, count: Count
) -> MigrateResult:
    """Move the medium to a new key, sealed as the options ask for, and replace its blob.

    Raises: HotplugError. Then the medium is as it was, or the same call completes it.
    """
    with held_medium(options, config, progress, is_dry=False) as (hold, volume):
        plan = plan_migration(options, config, hold, volume, progress)
        return carry_out(plan, hold, count)


def dry_run(options: MigrateOptions, config: Config, progress: Progress) -> MigrationPlan:
    """Return the plan, and change nothing. Raises: HotplugError, as `migrate`."""
    with held_medium(options, config, progress, is_dry=True) as (hold, volume):
        return plan_migration(options, config, hold, volume, progress)


def carry_out(plan: MigrationPlan, hold: disks.Held, count: Count) -> MigrateResult:
    """Carry out the plan on the disk that it was made for. Raises: HotplugError."""
    medium = plan.medium
    hold.require_disk(medium.disk)
    match medium.found:
        case Untouched(unused=unused) if unused is not None:
            _remove_unused_journal(medium.directory, unused)
    if plan.work is None:
        return MigrateResult(medium.volume.node, medium.label, medium.blob_file, None, None)
    # The mapping comes first: if others use the disk by now, nothing was written yet.
    with medium.through_key(hold, "migrate-from", medium.old) as before:
        if entry_of(hold, medium.volume) != medium.entry:
            raise HotplugError(
                f"migrate {medium.volume.node}: its partition table was changed meanwhile; try "
                "again"
            )
        match plan.work:
            case Begun(head=head):
                pass
            case NewKey() as new_key:
                head = _new_head(medium, new_key)
        kept = _move(medium, hold, head, before, count)
    disks.read_partitions(hold)
    recovery_file = None if head.recovery_file is None else Path(head.recovery_file)
    return MigrateResult(medium.volume.node, head.name, medium.blob_file, kept, recovery_file)


def _new_head(medium: MediumToMigrate, new_key: NewKey) -> migration_journal.Head:
    """Seal the new key, and describe the migration. The recovery file, if any, is written first.

    Raises: HotplugError.
    """
    options, entry = medium.options, medium.entry
    file, length = options.recovery_file, options.key_bytes
    if file is None:
        new = backends.seal(medium.method, length, medium.directory)
    else:
        about = partial(medium.about, new_key.filesystem)
        with store.recovery_key(file, new_key.recovery, about, length) as (_, key):
            new = backends.seal(medium.method, key, medium.directory)
    return migration_journal.Head(
        mark=uuid4(),
        name=entry.identity.name,
        type=entry.identity.type,
        uuid=entry.identity.uuid,
        start=entry.start,
        length=entry.length,
        blob=medium.blob_name,
        before=blobs.backend_of(medium.old),
        after=options.method.backend,
        old_blob=medium.old.content,
        new_blob=new,
        how=medium.settings,
        recovery_file=None if file is None else str(file),
    )


def _move(
    medium: MediumToMigrate,
    hold: disks.Held,
    head: migration_journal.Head,
    before: Mapping,
    count: Count,
) -> Path:
    """Move the medium by the journal, and replace its blob. Returns: where the old blob is kept.

    Raises: HotplugError.
    """
    directory = medium.directory
    new = blobs.parse(head.new_blob, head.after)
    with medium.through_key(hold, "migrate-to", new) as after:
        if isinstance(medium.found, Untouched):
            with store.folder(directory) as folder:
                migration_journal.create(folder.opened, directory, head)
        with migration_journal.opened(directory, head) as migration:
            _mark_and_reencrypt(medium, hold, (before, after), migration, count)
            through = f"migrate {shown(head.name)}: through its new key"
            checks.require_filesystem(after, medium.rule, through)
            kept = _swap_blobs(directory, head)
            marked_partition.write(hold, medium.entry.number, head.identity)
            _remove_journal(directory, head)
    return kept


def _mark_and_reencrypt(
    medium: MediumToMigrate,
    hold: disks.Held,
    mappings: tuple[Mapping, Mapping],
    migration: migration_journal.Migration,
    count: Count,
) -> None:
    """Mark the partition, and move all bytes, unless an earlier run has done all of it."""
    head = migration.head
    last = migration.journal.records()[0]
    is_moved = not last.content and last.position > 0
    if is_moved and marked_partition.mark_in(medium.entry) is None:
        return
    marked_partition.write(hold, medium.entry.number, marked_partition.migrating(head.mark))
    if head.recovery_file is not None and os.path.lexists(head.recovery_file):
        store.settle_recovery(Path(head.recovery_file))
    _reencrypt(medium, hold, mappings, migration.journal, count)


def _reencrypt(
    medium: MediumToMigrate,
    hold: disks.Held,
    mappings: tuple[Mapping, Mapping],
    journal: reencryption.Journal,
    count: Count,
) -> None:
    """Move every byte to the new key. Raises: HotplugError; KernelError."""
    before, after = mappings
    target = crypt_table.CryptTarget.from_line(before.table[0])
    if target is None:
        raise UnsupportedVolumeError(
            f"migrate {medium.volume.node}: its mapping was replaced meanwhile"
        )
    node, start, length = hold.disk.node, medium.data_start_bytes, target.length * SECTOR_BYTES
    with (
        medium_blocks.opened(node, os.O_RDWR) as raw,
        medium_blocks.opened(before.node, os.O_RDONLY) as old,
        medium_blocks.opened(after.node, os.O_RDWR) as new,
    ):

        def reached(position: int) -> None:
            hold.require_same(raw)  # a card may have been changed in its reader
            count(position, length)

        views = reencryption.Medium(
            Blocks(raw, node, start),
            Blocks(old, before.node),
            Blocks(new, after.node),
            start,
            length,
        )
        reencryption.reencrypt(views, journal, reached)


def _swap_blobs(directory: Path, head: migration_journal.Head) -> Path:
    """Put the new blob in the place of the old one. Returns: where the old one is kept.

    Raises: HotplugError if something else is in either place; KernelError.
    """
    file, kept = directory / head.blob, directory / f"{head.blob}.{head.before}"
    old = blobs.parse(head.old_blob, head.before)
    new = blobs.parse(head.new_blob, head.after)
    with store.folder(directory) as folder:
        there = None
        with suppress(BlobMissingError):
            there = blob_files.read(directory, head.blob)
        if there == old:
            atomic_files.move(folder.opened, file, kept.name)
            there = None
        if there is None:
            atomic_files.write(folder.opened, file, head.new_blob, store.BLOB_MODE)
        elif there != new:
            raise HotplugError(
                f"write {shown(file)}: it was replaced meanwhile; move it away and go on with the "
                "same command"
            )
    return kept


def _remove_unused_journal(directory: Path, head: migration_journal.Head) -> None:
    """Remove the journal that no medium needs. Raises: HotplugError if it is another by now."""
    with migration_journal.opened(directory, head) as migration:
        if not migration.journal.records()[0].is_first:
            path = shown(migration_journal.file(directory, head))
            raise HotplugError(f"remove {path}: it was replaced meanwhile; try again")
        _remove_journal(directory, head)


def _remove_journal(directory: Path, head: migration_journal.Head) -> None:
    with store.folder(directory) as folder:
        migration_journal.remove(folder.opened, directory, head)
