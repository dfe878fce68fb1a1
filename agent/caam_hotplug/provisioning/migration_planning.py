"""Plan the migration of a medium. All is read and checked here, and nothing is changed.

To read all of a medium may take an hour. The plan comes from one read, and what it relies on is
checked again before each write.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.config.rules import Plan, Rule, match_rules
from caam_hotplug.errors import DeviceInUseError, HotplugError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blob_files, device_users, disks, gpt
from caam_hotplug.keys import backends, store
from caam_hotplug.model import Volume
from caam_hotplug.provisioning import (
    checks,
    medium_blocks,
    migration_journal,
    temporary_mapping,
    volume_lookup,
)
from caam_hotplug.provisioning.migration_plan import (
    MediumToMigrate,
    MigrationPlan,
    NewKey,
    settings_of,
)
from caam_hotplug.provisioning.migration_stage import Begun, Untouched, find_migration
from caam_hotplug.provisioning.options import MigrateOptions, Progress


@contextmanager
def held_medium(
    options: MigrateOptions, config: Config, progress: Progress, *, is_dry: bool
) -> Iterator[tuple[disks.Held, Volume]]:
    """Find the partition, and hold its disk while the context is open.

    A killed run may have left mappings. A dry run refuses them, and any other run removes them.
    Raises: HotplugError if the partition is missing or used, or no journal could be kept.
    """
    checks.prepare(f"migrate {shown(options.volume)}")
    checks.require_lasting(config.blob_directory)
    volume = volume_lookup.find_partition(options.volume, config)
    disk = disks.disk_of(volume)
    disks.require_not_the_systems(disk, config.blob_directory)
    progress(f"reading {volume.node}")
    with disks.held(disk) as hold:
        if is_dry:
            temporary_mapping.require_no_leftovers(disk)
        else:
            temporary_mapping.remove_leftovers(disk)
        try:
            device_users.require_unused(disk)
        except DeviceInUseError as error:
            raise DeviceInUseError(
                f"migrate {volume.node}: {error}; if the agent has it, release it with "
                f"`{names.PROGRAM} lock {volume.node}`"
            ) from error
        yield hold, volume


def plan_migration(
    options: MigrateOptions,
    config: Config,
    hold: disks.Held,
    volume: Volume,
    progress: Progress,
) -> MigrationPlan:
    """Read partition table, journals, rule, blob and recovery file, and check the medium.

    Raises: HotplugError, and nothing was changed.
    """
    heads = tuple(migration_journal.heads(config.blob_directory))
    medium = _read_medium(options, config, hold, volume, heads)
    work: Begun | NewKey | None
    match medium.found:
        case Begun(head=head) as work:
            _check_continued(medium, head)
        case Untouched() if blobs.backend_of(medium.old) == options.method.backend:
            work = None
            _check_done(medium, hold)
        case Untouched(unused=unused):
            others = [head for head in heads if head != unused]
            work = _check_new(medium, hold, others, progress)
    return MigrationPlan(medium, work)


def _read_medium(
    options: MigrateOptions,
    config: Config,
    hold: disks.Held,
    volume: Volume,
    heads: Sequence[migration_journal.Head],
) -> MediumToMigrate:
    """Read the partition's entry, its journal among these, its rule and its blob."""
    directory = config.blob_directory
    entry = entry_of(hold, volume)
    found = find_migration(heads, entry, volume.node, directory)
    match found:
        case Begun(head=head):
            rule, blob_name = _rule_for(volume, head.identity, config)
            old = blobs.parse(head.old_blob, head.before)
        case Untouched():
            rule, blob_name = _rule_for(volume, entry.identity, config)
            old = blob_files.read(directory, blob_name, rule.key.form)
    return MediumToMigrate(
        options=options,
        directory=directory,
        disk=hold.disk,
        volume=volume,
        entry=entry,
        rule=rule,
        blob_name=blob_name,
        old=old,
        found=found,
    )


def entry_of(hold: disks.Held, volume: Volume) -> gpt.Entry:
    """Read the partition's entry. Raises: HotplugError if it could not be marked."""
    entries = gpt.read(hold.reading, hold.disk.node)
    if entries is None:
        raise HotplugError(
            f"migrate {volume.node}: its disk has no GPT, so that it cannot be marked while it "
            "is under two keys; make a new medium, and copy the files"
        )
    found = [entry for entry in entries if entry.number == volume.id.partition]
    if not found:
        raise HotplugError(
            f"migrate {volume.node}: the disk's table has no partition {volume.id.partition} "
            "any more; plug it anew"
        )
    return found[0]


def _rule_for(volume: Volume, identity: gpt.Identity, config: Config) -> tuple[Rule, str]:
    """Return the rule that opens the finished medium, and the blob's name. Raises: HotplugError."""
    finished = replace(
        volume,
        partlabel=identity.name,
        partuuid=str(identity.uuid),
        parttype=str(identity.type),
        identified=True,
    )
    match match_rules(config.rule, finished):
        case Plan(rule=rule, blob=blob):
            return rule, blob
        case no_match:
            raise HotplugError(
                f"migrate {volume.node}: how it is encrypted is for a rule to say, and no rule "
                f"matches it ({no_match})"
            )


def _check_done(medium: MediumToMigrate, hold: disks.Held) -> None:
    """Check that medium and blob both have such a key. Raises: HotplugError if the blob alone."""
    with medium.through_key(hold, "migrate-from", medium.old) as mapping:
        through = (
            f"migrate {medium.volume.node}: {shown(medium.blob_file)} is "
            f"{blobs.key_of(blobs.backend_of(medium.old))}'s already, and through that"
        )
        checks.require_filesystem(mapping, medium.rule, through)


def _check_continued(medium: MediumToMigrate, head: migration_journal.Head) -> None:
    """Check that it was begun with the same options and rule. Raises: HotplugError."""
    operation, options = f"go on with {shown(head.name)}", medium.options
    if (medium.entry.start, medium.entry.length) != (head.start, head.length):
        raise HotplugError(
            f"{operation}: the partition was moved or resized; put it back to {head.length} "
            f"sectors from sector {head.start} on"
        )
    if options.method.backend != head.after:
        raise HotplugError(f"{operation}: it was begun with --to {head.after}; go on with that")
    if options.recovery_file is not None and str(options.recovery_file) != head.recovery_file:
        other = head.recovery_file
        file = "without a recovery key" if other is None else f"with --recovery-key {shown(other)}"
        raise HotplugError(f"{operation}: it was begun {file}; go on so")
    settings = settings_of(medium.rule, head.before, head.after)
    if (settings, medium.blob_name) != (head.how, head.blob):
        raise HotplugError(
            f"{operation}: rule {medium.rule.name!r} says something else than when it was begun, "
            f"which was {head.how}, blob {shown(head.blob)}, and is {settings}, blob "
            f"{shown(medium.blob_name)}; put the rule back as it was until the medium is finished"
        )
    for content, backend in ((head.old_blob, head.before), (head.new_blob, head.after)):
        temporary_mapping.try_blob(
            medium.on_disk,
            "migrate-from",
            medium.entry.start,
            rule=medium.rule,
            blob=blobs.parse(content, backend),
            directory=medium.directory,
        )


def _check_new(
    medium: MediumToMigrate,
    hold: disks.Held,
    others: Sequence[migration_journal.Head],
    progress: Progress,
) -> NewKey:
    """Check all that a migration from the beginning needs. Raises: HotplugError; KernelError."""
    options, rule, directory = medium.options, medium.rule, medium.directory
    checks.require_migratable(options, rule, hold.disk, medium.data_start_bytes, medium.label)
    _require_names_free(medium, others)
    backends.BACKENDS[medium.method.backend].require_master(medium.method, directory)
    with medium.through_key(hold, "migrate-from", medium.old) as mapping:
        through = f"migrate {medium.volume.node}: through its key"
        filesystem = checks.require_filesystem(mapping, rule, through)
        recovery, file = None, options.recovery_file
        if file is not None:
            recovery = store.find_recovery(
                file, partial(medium.about, filesystem), options.key_bytes
            )
            store.require_unsettled(recovery, file)
        temporary_mapping.try_method(
            medium.on_disk,
            "migrate-to",
            medium.entry.start,
            rule=rule,
            method=medium.method,
            key_bytes=options.key_bytes,
            directory=directory,
        )
        # All of it is read under the mapping, so that nobody can use the disk meanwhile.
        medium_blocks.require_readable(hold, medium.entry, progress)
    return NewKey(filesystem, recovery)


def _require_names_free(medium: MediumToMigrate, others: Sequence[migration_journal.Head]) -> None:
    """Check that neither a kept blob nor another's journal has a name that this run needs.

    Raises: HotplugError.
    """
    operation = f"migrate {shown(medium.label)}"
    kept = f"{medium.blob_name}.{blobs.backend_of(medium.old)}"
    if store.find_blob(medium.directory, kept).exists:
        raise HotplugError(
            f"{operation}: {shown(medium.directory / kept)} is there, where its old blob is to be "
            "kept; move that away"
        )
    for head in others:
        if head.blob == medium.blob_name:
            raise HotplugError(
                f"{operation}: another medium with blob {shown(head.blob)} is not finished; "
                "finish that one first, or remove "
                f"{shown(migration_journal.file(medium.directory, head))} if it is lost"
            )
