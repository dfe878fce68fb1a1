"""Plan the migration of a medium. All is read and checked here, and nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

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
from caam_hotplug.provisioning.migration_plan import MigrationPlan, settings_of
from caam_hotplug.provisioning.migration_stage import Stage, find_migration
from caam_hotplug.provisioning.options import MigrateOptions, Progress


@contextmanager
def held_medium(
    options: MigrateOptions, config: Config, progress: Progress, *, is_dry: bool
) -> Iterator[tuple[disks.Held, Volume]]:
    """Find the partition, and hold its disk while the context is open.

    Mappings that a killed run left are removed, but by a dry run, which refuses them.
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
    """Read partition table, journals, rule, blob and recovery file once, and check the medium.

    Raises: HotplugError, and nothing was changed.
    """
    directory = config.blob_directory
    entry = entry_of(hold, volume)
    heads = tuple(migration_journal.heads(directory))
    found = find_migration(heads, entry, volume.node, directory)
    head = found.head
    rule, blob_name = _rule_for(volume, entry.identity if head is None else head.identity, config)
    if head is None:
        old = blob_files.read(directory, blob_name, rule.key.form)
        stage = Stage.BEGIN if blobs.backend_of(old) != options.method.backend else Stage.DONE
    else:
        old, stage = blobs.parse(head.old_blob, head.before), Stage.CONTINUE
    plan = MigrationPlan(
        options=options,
        directory=directory,
        disk=hold.disk,
        volume=volume,
        entry=entry,
        rule=rule,
        blob_name=blob_name,
        old=old,
        stage=stage,
        migration=found,
    )
    if head is not None:
        _check_continued(plan, head)
    elif stage is Stage.DONE:
        _check_done(plan, hold)
    return plan if stage is not Stage.BEGIN else _check_new(plan, hold, heads, progress)


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


def _check_done(plan: MigrationPlan, hold: disks.Held) -> None:
    """Check that medium and blob both have such a key. Raises: HotplugError if the blob alone."""
    with temporary_mapping.through_key(
        hold, "migrate-from", plan.entry, rule=plan.rule, blob=plan.old, directory=plan.directory
    ) as mapping:
        through = (
            f"migrate {plan.volume.node}: {shown(plan.blob_file)} is "
            f"{blobs.key_of(blobs.backend_of(plan.old))}'s already, and through that"
        )
        checks.require_filesystem(mapping, plan.rule, through)


def _check_continued(plan: MigrationPlan, head: migration_journal.Head) -> None:
    """Check that it was begun with the same options and rule. Raises: HotplugError."""
    operation, options = f"go on with {shown(head.name)}", plan.options
    if (plan.entry.start, plan.entry.length) != (head.start, head.length):
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
    settings = settings_of(plan.rule, head.before, head.after)
    if (settings, plan.blob_name) != (head.how, head.blob):
        raise HotplugError(
            f"{operation}: rule {plan.rule.name!r} says something else than when it was begun, "
            f"which was {head.how}, blob {shown(head.blob)}, and is {settings}, blob "
            f"{shown(plan.blob_name)}; put the rule back as it was until the medium is finished"
        )
    for content, backend in ((head.old_blob, head.before), (head.new_blob, head.after)):
        temporary_mapping.try_blob(
            plan.on_disk,
            "migrate-from",
            plan.entry.start,
            rule=plan.rule,
            blob=blobs.parse(content, backend),
            directory=plan.directory,
        )


def _check_new(
    plan: MigrationPlan,
    hold: disks.Held,
    heads: Sequence[migration_journal.Head],
    progress: Progress,
) -> MigrationPlan:
    """Check all that a migration from the beginning needs. Raises: HotplugError; KernelError."""
    options, rule, label = plan.options, plan.rule, plan.label
    checks.require_migratable(options, rule, hold.disk, plan.data_start_bytes, label)
    _require_names_free(plan, heads)
    backends.BACKENDS[plan.method.backend].require_master(plan.method, plan.directory)
    with temporary_mapping.through_key(
        hold, "migrate-from", plan.entry, rule=rule, blob=plan.old, directory=plan.directory
    ) as mapping:
        through = f"migrate {plan.volume.node}: through its key"
        plan = replace(plan, filesystem=checks.require_filesystem(mapping, rule, through))
        if options.recovery_file is not None:
            found = store.find_recovery(options.recovery_file, plan.about, options.key_bytes)
            store.require_unsettled(found, options.recovery_file)
            plan = replace(plan, recovery=found)
        temporary_mapping.try_method(
            plan.on_disk,
            "migrate-to",
            plan.entry.start,
            rule=rule,
            method=plan.method,
            key_bytes=options.key_bytes,
            directory=plan.directory,
        )
        # All of it is read under the mapping, so that nobody can use the disk meanwhile.
        medium_blocks.require_readable(hold, plan.entry, progress)
    return plan


def _require_names_free(plan: MigrationPlan, heads: Sequence[migration_journal.Head]) -> None:
    """Check that neither a kept blob nor a journal has a name that this run needs.

    Raises: HotplugError.
    """
    operation = f"migrate {shown(plan.label)}"
    kept = f"{plan.blob_name}.{blobs.backend_of(plan.old)}"
    if store.find_blob(plan.directory, kept).exists:
        raise HotplugError(
            f"{operation}: {shown(plan.directory / kept)} is there, where its old blob is to be "
            "kept; move that away"
        )
    for head in heads:
        if head.blob == plan.blob_name and head != plan.migration.unused:
            raise HotplugError(
                f"{operation}: another medium with blob {shown(head.blob)} is not finished; "
                "finish that one first, or remove "
                f"{shown(migration_journal.file(plan.directory, head))} if it is lost"
            )
