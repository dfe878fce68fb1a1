"""Plan how a partition of a disk in use is provisioned. All is read here, and nothing is changed.

How far earlier runs have come is read off the blob directory and the table:

    record   blob        partition                       this run
    none     none        any                             begins
    there    none        between as it was and made      erases it again, and goes on
    there    the same    made                            writes entry, removes record
    none     there       finished, under the blob        finds it finished

A record of another partition, and a blob that is in the way, are refused.
"""

from __future__ import annotations

from dataclasses import replace
from uuid import UUID

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.errors import BlobError, BlobRejectedError, HotplugError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blkid, gpt
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
from caam_hotplug.provisioning.partition_plan import Anew, Begun, Finished, PartitionPlan
from caam_hotplug.provisioning.partition_record import Record
from caam_hotplug.provisioning.partition_target import Target
from caam_hotplug.provisioning.provision_stage import FoundKeys, find_keys

_UNFINISHED = "a medium that is not finished, begun with another label or on another board"


def plan_partition(options: ProvisionOptions, config: Config, target: Target) -> PartitionPlan:
    """Read blob, record, recovery file, rule and partition, and check them and the kernel.

    Raises: HotplugError, and nothing was changed.
    """
    options, directory = _with_rule(options, target), config.blob_directory
    keys = find_keys(options, directory)
    record = partition_record.find(directory, options.blob_name)
    stage, content = _stage_of(options, config, target, keys, record)
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
        marks_unfinished=target.table.marks_unfinished,
        notes=(*notes, *rule.notes),
    )


def whole(target: Target) -> gpt.Entry:
    """Describe the partition as all of what is held, for a mapping over it."""
    no_entry = gpt.Identity("", marked_partition.LINUX_DATA, UUID(int=0))
    return gpt.Entry(0, no_entry, Sectors(0), target.volume.size)


def _with_rule(options: ProvisionOptions, target: Target) -> ProvisionOptions:
    """Let the rule know the partition by its PARTUUID if its table has no labels."""
    if target.table.kind == "gpt":
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
) -> tuple[Anew | Begun | Finished, str | None]:
    """Return how far earlier runs have come, and what would be erased. Raises: HotplugError."""
    if record is not None:
        is_formatted = _check_record(options, config, target, keys, record)
        content = None if is_formatted else blkid.known_contents(target.volume.node)
        return Begun(record, is_formatted), content
    blob = keys.blob.blob
    is_finished = blob is not None and target.is_finished(options.label)
    if blob is not None and is_finished and _opens(options, config, target, blob):
        return Finished(blob), None
    if target.entry.type == names.UNFINISHED_TYPE:
        return Anew(), _UNFINISHED
    return Anew(), medium_content.of(target.hold, config)


def _check_record(
    options: ProvisionOptions, config: Config, target: Target, keys: FoundKeys, record: Record
) -> bool:
    """Check that the record is the partition's. Returns: whether the filesystem is whole.

    Raises: HotplugError.
    """
    file = shown(partition_record.file(config.blob_directory, options.blob_name))
    if not record.is_of(target.table.disk_id, target.disk.disk.serial, target.entry.place):
        raise HotplugError(
            f"provision {target.volume.node}: {file} says that {options.label} was begun on "
            f"partition {record.number} of another disk or at another place: disk {record.disk}, "
            f"serial number {shown(str(record.serial))}, sector {record.start}; go on there, or "
            "remove that file to begin anew"
        )
    if keys.blob.exists and keys.blob.blob != record.parsed_blob:
        blob = shown(config.blob_directory / options.blob_name)
        raise HotplugError(
            f"go on with {target.volume.node}: {blob} is of another medium, and {file} has the "
            "key of this one; move one of them away"
        )
    return keys.blob.exists


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
    stage: Anew | Begun | Finished,
) -> tuple[str, ...]:
    """Check the keys that are there against the options. Returns: notes. Raises: HotplugError."""
    node, directory = target.volume.node, config.blob_directory
    match stage:
        case Anew():
            return key_checks.check_new_keys(options, keys, directory)
        case Finished(blob=blob):
            return key_checks.check_finished(options, blob, keys, target.volume)
        case Begun(record=record):
            file = shown(partition_record.file(directory, options.blob_name))
            anew = f"use the same, or remove {file} to begin anew"
            begun = f"go on with {node}: it was begun"
            key_checks.require_same_choices(options, record.parsed_blob, begun, anew)
            given = None if keys.recovery is None else keys.recovery.id
            is_wanted = options.recovery_file is not None
            if given != record.recovery or is_wanted != (record.recovery is not None):
                raise HotplugError(f"{begun} with another recovery file, or none; {anew}")
    return ()


def _blob_of(stage: Begun | Finished) -> blobs.Blob:
    match stage:
        case Begun(record=record):
            return record.parsed_blob
        case Finished(blob=blob):
            return blob


def _opens(options: ProvisionOptions, config: Config, target: Target, blob: blobs.Blob) -> bool:
    """Whether the filesystem lies on the partition, under the key of the label's blob."""
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
