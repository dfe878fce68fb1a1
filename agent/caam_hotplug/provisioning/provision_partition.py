"""Provision one partition of a disk in use. A second run goes on after an interruption.

First the plan is made, and then carried out in an order that keeps the key and the disk's table:

- The recovery file is written, and then a record beside the blobs, which has the sealed key.
- The entry in the table gets label and type of one that is not finished. By that, what an earlier
  run has left differs from what came later. In a GPT no rule matches that type.
- The filesystem is made. Then the blob gets its name, by which the agent finds it.
- The entry gets the type of a finished one, the copy that counts last. The record is removed.

Every write to the table is of one block, and leaves a table that is whole. The kernel's partitions
are not read anew, as neither start nor size of any has changed.
"""

from __future__ import annotations

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import uevent_request
from caam_hotplug.keys import backends, store
from caam_hotplug.provisioning import (
    partition_record,
    partition_target,
    provision_steps,
    temporary_mapping,
)
from caam_hotplug.provisioning.options import Progress, ProvisionOptions
from caam_hotplug.provisioning.partition_plan import Anew, Begun, Finished, PartitionPlan
from caam_hotplug.provisioning.partition_planning import plan_partition, whole
from caam_hotplug.provisioning.partition_record import Record
from caam_hotplug.provisioning.partition_target import Target, held_partition
from caam_hotplug.provisioning.provision_stage import find_keys
from caam_hotplug.provisioning.provision_steps import Announce, ProvisionResult


def provision(
    options: ProvisionOptions, config: Config, progress: Progress, announce: Announce
) -> ProvisionResult:
    """Make the partition a medium: encryption under a blob of this board, a filesystem, a label.

    Raises: HotplugError. Then the partition is as it was, or the same call completes it.
    """
    with held_partition(options, config, progress, is_dry=False) as target:
        plan = plan_partition(options, config, target)
        result = carry_out(plan, target, progress, announce)
    uevent_request.changed(target.volume)
    return result


def dry_run(options: ProvisionOptions, config: Config, progress: Progress) -> PartitionPlan:
    """Return the plan, and change nothing. Raises: HotplugError, as `provision`."""
    with held_partition(options, config, progress, is_dry=True) as target:
        return plan_partition(options, config, target)


def carry_out(
    plan: PartitionPlan, target: Target, progress: Progress, announce: Announce
) -> ProvisionResult:
    """Carry out the plan on the partition that it was made for. Raises: HotplugError."""
    options = plan.options
    target.hold.require_disk(plan.volume)
    with store.folder(plan.blob_directory) as folder:
        _require_same(plan)
        match plan.stage:
            case Anew():
                _make(plan, target, folder, _begin(plan, target, folder, progress), progress)
            case Begun(record=record, is_formatted=False):
                _make(plan, target, folder, record, progress)
            case Begun(record=record) if not folder.has(options.label):
                folder.write(options.label, record.blob, settled=True)
        plan.rule.write()
        notes = [*plan.notes]
        if options.rule_file is not None:
            notes = [f"the rule is in {shown(options.rule_file)}", *notes, *announce()]
        if not isinstance(plan.stage, Finished):
            progress("writing the label")
            _write_entry(target, target.finished_type, options.label)
            partition_record.remove(folder.opened, folder.path, options.blob_name)
    was_made_before = isinstance(plan.stage, Finished)
    return ProvisionResult(
        partition=plan.volume.node,
        blob=plan.blob_file,
        was_made_before=was_made_before,
        recovery_file=None if was_made_before else options.recovery_file,
        notes=tuple(notes),
    )


def _require_same(plan: PartitionPlan) -> None:
    """Check that the plan's keys and record are there, now that the folder is locked.

    Raises: HotplugError.
    """
    options, directory = plan.options, plan.blob_directory
    record = plan.stage.record if isinstance(plan.stage, Begun) else None
    found = partition_record.find(directory, options.blob_name)
    if find_keys(options, directory) != plan.keys or found != record:
        raise HotplugError(f"go on with {plan.volume.node}: its key was replaced meanwhile")


def _begin(plan: PartitionPlan, target: Target, folder: store.Folder, progress: Progress) -> Record:
    """Make the key, and store it in a record of the partition. Raises: HotplugError; BlobError."""
    options, label = plan.options, plan.options.label
    progress("making the key")
    with provision_steps.key_for(options, plan.keys) as (recovery_id, key):
        sealed = backends.seal(options.method, key, folder.path)
    folder.discard_unsettled(label)
    store.require_new(label, folder)
    place = target.entry.place
    record = Record(
        disk=target.table.disk_id,
        serial=target.serial,
        number=place.number,
        start=place.start,
        length=place.size,
        partuuid=target.entry.uuid,
        settings=options.settings,
        backend=options.method.backend,
        blob=sealed,
        digest=partition_record.digest_of(sealed),
        recovery=recovery_id,
    )
    blobs.parse(sealed, options.method.backend)
    partition_record.create(folder.opened, folder.path, options.blob_name, record)
    return record


def _make(
    plan: PartitionPlan,
    target: Target,
    folder: store.Folder,
    record: Record,
    progress: Progress,
) -> None:
    """Make the filesystem under the record's key; then the blob gets its name.

    The mapping comes first: from then on, nothing else can use the partition. Raises: HotplugError.
    """
    options = plan.options
    if options.recovery_file is not None:
        store.settle_recovery(options.recovery_file)
    progress(f"making the filesystem ({options.filesystem})")
    with temporary_mapping.through_key(
        target.hold,
        "provision",
        whole(target),
        rule=options.rule,
        blob=record.parsed_blob,
        directory=plan.blob_directory,
    ) as mapping:
        _write_entry(target, target.unfinished_type, options.label)
        entry = whole(target)
        target.hold.wipe(entry.start, entry.length)
        provision_steps.make_filesystem(options, mapping.node, target.volume.node)
    folder.write(options.label, record.blob, settled=True)


def _write_entry(target: Target, kind: str, label: str) -> None:
    """Change the entry of the partition, if it is where it was. Raises: HotplugError."""
    with partition_target.opened_table(target.disk, target.volume) as (blocks, table, entry):
        if table.disk_id != target.table.disk_id:
            raise HotplugError(
                f"provision {target.volume.node}: the disk's table was replaced meanwhile"
            )
        table.write(blocks, entry.place.number, kind, label)
