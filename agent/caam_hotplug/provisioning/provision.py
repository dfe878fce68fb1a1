"""Provision a medium: key, partition table, filesystem. A second run goes on after an interruption.

First the plan is made, and then carried out in an order that keeps every medium's key:

- The recovery file is written, and then the blob. Both are on the disk before the medium is
  touched. Neither is settled: each has a second, temporary name. The next run may discard such a
  blob, and use the key of such a recovery file.
- The medium gets its partition table with a mark instead of a label. The mark names label, blob
  and recovery file. Then both files are settled, and never touched again.
- The filesystem is made. The last act is to write the label in the place of the mark.
"""

from __future__ import annotations

from uuid import uuid4

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import disks, gpt
from caam_hotplug.keys import backends, store
from caam_hotplug.provisioning import (
    marked_partition,
    provision_partition,
    provision_steps,
    temporary_mapping,
)
from caam_hotplug.provisioning.options import Progress, ProvisionOptions
from caam_hotplug.provisioning.partition_plan import PartitionPlan
from caam_hotplug.provisioning.provision_plan import ProvisionPlan
from caam_hotplug.provisioning.provision_planning import held_disk, plan_provisioning
from caam_hotplug.provisioning.provision_stage import find_keys
from caam_hotplug.provisioning.provision_steps import Announce, ProvisionResult


def provision(
    options: ProvisionOptions, config: Config, progress: Progress, announce: Announce
) -> ProvisionResult:
    """Make the disk a medium: a label, encryption under a blob of this board, a filesystem.

    One partition is made alone, and its disk may be in use (`provision_partition`).
    Raises: HotplugError. Then the medium is as it was, or the same call completes it.
    """
    if is_of_partition(options):
        return provision_partition.provision(options, config, progress, announce)
    with held_disk(options, config, progress, is_dry=False) as hold:
        plan = plan_provisioning(options, config, hold)
        return carry_out(plan, hold, progress, announce)


def dry_run(
    options: ProvisionOptions, config: Config, progress: Progress
) -> ProvisionPlan | PartitionPlan:
    """Return the plan, and change nothing. Raises: HotplugError, as `provision`."""
    if is_of_partition(options):
        return provision_partition.dry_run(options, config, progress)
    with held_disk(options, config, progress, is_dry=True) as hold:
        return plan_provisioning(options, config, hold)


def is_of_partition(options: ProvisionOptions) -> bool:
    """Whether one partition is to be made: a label or PARTUUID, or the node of one."""
    return "/" not in options.device or disks.is_partition(options.device)


def carry_out(
    plan: ProvisionPlan, hold: disks.Held, progress: Progress, announce: Announce
) -> ProvisionResult:
    """Carry out the plan on the disk that it was made for.

    `announce` is called while the medium has no label yet. With a label, the agent would open the
    medium by the rules that it had before. Raises: HotplugError.
    """
    options, disk, earlier = plan.options, hold.disk, plan.earlier
    was_made_before = earlier is not None and earlier.is_finished
    hold.require_disk(plan.disk)
    with store.folder(plan.blob_directory) as folder:
        if earlier is None:
            entry, blob = _begin(plan, hold, folder, progress)
        else:
            entry, blob = earlier.entry, earlier.blob
            _require_same_keys(plan, hold)
        uuid = entry.identity.uuid
        if not was_made_before:
            _settle(plan, folder)
            _format(plan, hold, entry, blob, progress)
            uuid = uuid4()
        plan.rule.write()
        notes = [*plan.notes]
        if options.rule_file is not None:
            notes = [f"the rule is in {shown(options.rule_file)}", *notes, *announce()]
        progress("writing the label")
        # One of the table's two copies may lack the label that the medium had before.
        identity = gpt.Identity(options.label, marked_partition.LINUX_DATA, uuid)
        marked_partition.write(hold, entry.number, identity)
        disks.read_partitions(hold)
    return ProvisionResult(
        partition=f"{disk.node}{'p' if disk.name[-1].isdigit() else ''}1",
        blob=plan.blob_file,
        was_made_before=was_made_before,
        recovery_file=None if was_made_before else options.recovery_file,
        notes=tuple(notes),
    )


def _begin(
    plan: ProvisionPlan, hold: disks.Held, folder: store.Folder, progress: Progress
) -> tuple[gpt.Entry, blobs.Blob]:
    """Store the keys, and mark the medium for them. Raises: HotplugError; BlobError."""
    options, label = plan.options, plan.options.label
    if not folder.is_unsettled(label):  # only from now on no other command writes to the folder
        store.require_new(label, folder)
    progress("making the key")
    with provision_steps.key_for(options, plan.keys) as (recovery_id, key):
        sealed = backends.seal(options.method, key, folder.path)
    folder.discard_unsettled(label)
    folder.write(label, sealed, settled=False)
    blob = folder.read(label)
    progress("writing the partition table")
    mark = marked_partition.mark_of(label, recovery_id, blob)
    identity = marked_partition.provisioning(mark)
    return gpt.make(hold.writing(), hold.disk.node, identity), blob


def _require_same_keys(plan: ProvisionPlan, hold: disks.Held) -> None:
    """Check that the plan's blob and recovery file are there, now that the folder is locked.

    Raises: HotplugError.
    """
    if find_keys(plan.options, plan.blob_directory) != plan.keys:
        raise HotplugError(
            f"go on with {hold.disk.node}: its key was replaced meanwhile; try again"
        )


def _settle(plan: ProvisionPlan, folder: store.Folder) -> None:
    """Settle blob and recovery file, as the medium relies on both."""
    folder.settle(plan.options.label)
    if plan.options.recovery_file is not None:
        store.settle_recovery(plan.options.recovery_file)


def _format(
    plan: ProvisionPlan, hold: disks.Held, entry: gpt.Entry, blob: blobs.Blob, progress: Progress
) -> None:
    """Make the filesystem, under the key of the blob as it is stored. Raises: HotplugError."""
    options = plan.options
    progress(f"making the filesystem ({options.filesystem})")
    hold.wipe(entry.start, entry.length)
    with temporary_mapping.through_key(
        hold,
        "provision",
        entry,
        rule=options.rule,
        blob=blob,
        directory=plan.blob_directory,
    ) as mapping:
        provision_steps.make_filesystem(options, mapping.node, hold.disk.node)
