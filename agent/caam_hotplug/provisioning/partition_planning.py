"""Plan how a partition of a disk in use is provisioned. All is read here, and nothing is changed.

How far earlier runs have come is read off the blob directory and the table:

    record   blob        partition                       this run
    none     none        any                             begins
    there    none        marked as not finished          erases it again, and goes on
    there    none        not marked                      begins, under the record's key
    there    none        finished, opens under the key   writes blob and entry, removes record
    there    the same    opens under the key             writes entry, removes record
    none     there       finished, opens under the key   finds it finished

Only where the partition itself shows that an earlier run has begun it, it is erased unasked. A
record of another partition, and a blob that is in the way, are refused.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import (
    BlobError,
    BlobRejectedError,
    DmError,
    HotplugError,
    MappingBusyError,
    shown,
)
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blkid, device_users, gpt
from caam_hotplug.model import Sectors
from caam_hotplug.provisioning import (
    key_checks,
    marked_partition,
    medium_content,
    partition_record,
    rule_file,
    temporary_mapping,
)
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.partition_plan import (
    Anew,
    Begun,
    Finished,
    PartitionPlan,
    Stage,
    erases,
)
from caam_hotplug.provisioning.partition_record import Record
from caam_hotplug.provisioning.partition_target import Target
from caam_hotplug.provisioning.provision_stage import FoundKeys, find_keys


def plan_partition(options: ProvisionOptions, config: Config, target: Target) -> PartitionPlan:
    """Read blob, record, recovery file, rule and partition, and check them and the kernel.

    Raises: HotplugError, and nothing was changed.
    """
    options, directory = _with_rule(options, target), config.blob_directory
    rule_file.require_writable(options, config)
    keys = find_keys(options, directory)
    record = partition_record.find(directory, options.blob_name)
    stage, content = _stage_of(options, config, target, keys, record), None
    if erases(stage):
        device_users.require_unused(target.volume, target.hold.reading)
        content = _content(options, config, target, stage)
        _require_erasable(options, target, content)
    notes = _check_keys(options, config, target, keys, stage)
    test_blob = temporary_mapping.try_method(
        target.volume,
        "provision",
        Sectors(0),
        rule=options.rule,
        method=options.method,
        key_bytes=options.key_bytes,
        directory=directory,
    )
    blob = test_blob if isinstance(stage, Anew) else _blob_of(stage)
    rule = rule_file.plan_rule(options, config, target.finished(options.label), blob)
    return PartitionPlan(
        options=options,
        blob_directory=directory,
        volume=target.volume,
        entry=target.entry,
        stage=stage,
        content=content,
        keys=keys,
        rule=rule,
        has_label=target.has_label,
        notes=(*notes, *rule.notes),
    )


def whole(target: Target) -> gpt.Entry:
    """Describe the partition as all of what is held, for a mapping over it."""
    no_entry = gpt.Identity("", marked_partition.LINUX_DATA, UUID(int=0))
    return gpt.Entry(0, no_entry, Sectors(0), target.volume.size)


def _with_rule(options: ProvisionOptions, target: Target) -> ProvisionOptions:
    """Let the rule know the partition by its PARTUUID if its table has no labels."""
    if target.has_label:
        return options
    rule, text = rule_file.rule_for(
        options.label,
        backend=options.method.backend,
        key_bytes=options.key_bytes,
        key_options=options.method.options,
        filesystem=options.filesystem,
        cipher=options.rule.crypt.cipher,
        sector_size=options.rule.crypt.sector_size,
        partuuid=target.entry.uuid,
    )
    return replace(options, rule=rule, rule_text=text)


def _stage_of(
    options: ProvisionOptions,
    config: Config,
    target: Target,
    keys: FoundKeys,
    record: Record | None,
) -> Stage:
    """Return how far earlier runs have come. Raises: HotplugError."""
    label, blob = options.label, keys.blob.blob
    if record is not None:
        _check_record(options, config, target, keys, record)
        return Begun(record, _is_formatted(options, config, target, keys, record))
    if blob is not None and target.is_finished(label) and _opens(options, config, target, blob):
        return Finished(blob)
    return Anew()


def _is_formatted(
    options: ProvisionOptions, config: Config, target: Target, keys: FoundKeys, record: Record
) -> bool:
    """Whether an earlier run has finished the filesystem. Raises: HotplugError.

    Then the blob has got its name. If it was lost since, a finished entry says so, too.
    """
    others = None if target.is_unfinished(options.label) else target.mark
    may_be = keys.blob.exists or target.is_finished(options.label)
    if may_be and not others and _opens(options, config, target, record.parsed_blob):
        return True
    if keys.blob.exists:
        blob = shown(config.blob_directory / options.blob_name)
        raise HotplugError(
            f"go on with {target.volume.node}: it holds "
            f"{others or f'no {options.filesystem} under the key of {blob}'}; "
            f"{_to_begin_anew(options, config, target, keys)}"
        )
    return False


def _to_begin_anew(
    options: ProvisionOptions, config: Config, target: Target, keys: FoundKeys
) -> str:
    """Return what to do to give up what an earlier run has begun."""
    return (
        f"remove {_files_of(options, config, keys)} to begin anew, with --erase "
        f"{target.volume.name} if all that it holds may be lost"
    )


def _files_of(options: ProvisionOptions, config: Config, keys: FoundKeys) -> str:
    """Return the files that an earlier run has left."""
    files = [partition_record.file(config.blob_directory, options.blob_name)]
    if keys.blob.exists:
        files.append(config.blob_directory / options.blob_name)
    return " and ".join(map(shown, files))


def _content(options: ProvisionOptions, config: Config, target: Target, stage: Stage) -> str | None:
    """Describe what the partition holds and would be erased. None for what may be erased unasked.

    What an earlier run has left looks like noise, as a finished medium does. So the mark in the
    table counts. That in an MBR is not ours alone, and a disk without a serial number may be
    another with the same image. A filesystem in the clear is nothing that a run leaves.
    """
    if isinstance(stage, Begun) and target.is_unfinished(options.label):
        is_certain = target.has_label or stage.record.serial is not None
        return (
            blkid.known_contents(target.volume.node)
            if is_certain
            else medium_content.of(target.hold, config)
        )
    return target.mark or medium_content.of(target.hold, config)


def _check_record(
    options: ProvisionOptions, config: Config, target: Target, keys: FoundKeys, record: Record
) -> None:
    """Check that the record is of this partition, key and command. Raises: HotplugError."""
    file = shown(partition_record.file(config.blob_directory, options.blob_name))
    if not record.is_of(target.table.disk_id, target.serial, target.entry.place):
        raise HotplugError(
            f"provision {target.volume.node}: {file} says that {options.label} was begun on "
            f"partition {record.number} of another disk or at another place: disk {record.disk}, "
            f"serial number {shown(str(record.serial))}, sector {record.start}; go on there, or "
            f"choose another label; if that one is given up, remove "
            f"{_files_of(options, config, keys)}"
        )
    if keys.blob.exists and keys.blob.blob != record.parsed_blob:
        blob = shown(config.blob_directory / options.blob_name)
        raise HotplugError(
            f"go on with {target.volume.node}: {blob} is of another medium, and {file} has the "
            "key of this one; move one of them away"
        )
    anew = f"use the same, or {_to_begin_anew(options, config, target, keys)}"
    begun = f"go on with {target.volume.node}: it was begun"
    key_checks.require_same_choices(options, record.parsed_blob, begun, anew)
    if options.settings != record.settings:
        raise HotplugError(
            f"{begun} with {shown(record.settings)}, not with {options.settings}; {anew}"
        )
    given = None if keys.recovery is None else keys.recovery.id
    is_wanted = options.recovery_file is not None
    if given != record.recovery or is_wanted != (record.recovery is not None):
        raise HotplugError(f"{begun} with another recovery file, or none; {anew}")


def _require_erasable(options: ProvisionOptions, target: Target, content: str | None) -> None:
    if content is not None and options.erase is None:
        raise HotplugError(
            f"provision {target.volume.node}: it holds {content}; if all of it may be lost, say "
            f"so with --erase {target.volume.name}"
        )


def _check_keys(
    options: ProvisionOptions,
    config: Config,
    target: Target,
    keys: FoundKeys,
    stage: Stage,
) -> tuple[str, ...]:
    """Check the keys that are there against the options. Returns: notes. Raises: HotplugError."""
    match stage:
        case Anew():
            return key_checks.check_new_keys(options, keys, config.blob_directory)
        case Finished(blob=blob):
            return key_checks.check_finished(options, blob, keys, target.volume)
    return ()


def _blob_of(stage: Begun | Finished) -> blobs.Blob:
    match stage:
        case Begun(record=record):
            return record.parsed_blob
        case Finished(blob=blob):
            return blob


def _opens(options: ProvisionOptions, config: Config, target: Target, blob: blobs.Blob) -> bool:
    """Whether the filesystem lies on the partition, under the key of the label's blob.

    The agent may have it mapped meanwhile: the kernel allows mappings beside each other, and
    nothing else (_dm_claim_ptr in drivers/md/dm.c). Raises: HotplugError.
    """
    try:
        with temporary_mapping.through_key(
            target.hold,
            "provision",
            whole(target),
            rule=options.rule,
            blob=blob,
            directory=config.blob_directory,
        ) as mapping:
            return blkid.probe(mapping.node, [options.filesystem]) is not None
    except (BlobError, BlobRejectedError):
        return False
    except MappingBusyError:
        raise
    except DmError:
        device_users.require_unused(target.volume, target.hold.reading)
        raise
