"""Plan how a medium is provisioned. All is read and checked here, and nothing is changed.

The plan comes from one read, and what it relies on is checked again before each write.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import HotplugError, shown
from caam_hotplug.kernel import device_users, disks, system_partitions
from caam_hotplug.model import Sectors
from caam_hotplug.provisioning import (
    checks,
    key_checks,
    marked_partition,
    rule_file,
    temporary_mapping,
)
from caam_hotplug.provisioning.options import Progress, ProvisionOptions
from caam_hotplug.provisioning.provision_plan import ProvisionPlan
from caam_hotplug.provisioning.provision_stage import (
    EarlierRun,
    FoundMedium,
    examine,
    find_keys,
)


@contextmanager
def held_disk(
    options: ProvisionOptions, config: Config, progress: Progress, *, is_dry: bool
) -> Iterator[disks.Held]:
    """Check the options, and hold the disk while the context is open.

    A killed run may have left mappings. A dry run refuses them, and any other run removes them.
    Raises: HotplugError if the options make no sense, or the disk is used.
    """
    checks.prepare(f"provision {shown(options.device)}")
    disk = disks.whole_disk(options.device)
    checks.require_provisionable(options, config, disk)
    rule_file.require_writable(options, config)
    disks.require_not_the_systems(disk, config.blob_directory)
    system_partitions.require_not_a_systems_name(options.label)
    progress(f"reading {disk.node}")
    with disks.held(disk) as hold:
        if is_dry:
            temporary_mapping.require_no_leftovers(disk)
        else:
            temporary_mapping.remove_leftovers(disk)
        device_users.require_unused(disk)
        yield hold


def plan_provisioning(options: ProvisionOptions, config: Config, hold: disks.Held) -> ProvisionPlan:
    """Read blob, recovery file, rule and medium, and check them and the kernel.

    Raises: HotplugError, and nothing was changed.
    """
    disk, directory = hold.disk, config.blob_directory
    keys = find_keys(options, directory)
    medium = examine(options, hold, keys, config)
    _require_erasable(options, hold, medium)
    notes: tuple[str, ...] = ()
    if medium.earlier is None:
        notes = key_checks.check_new_keys(options, keys, directory)
    elif medium.earlier.is_finished:
        notes = key_checks.check_finished(options, medium.earlier.blob, keys, hold.disk)
    else:
        _check_unfinished(options, hold, medium.earlier, directory)
    test_blob = temporary_mapping.try_method(
        disk,
        "provision",
        Sectors(0),
        rule=options.rule,
        method=options.method,
        key_bytes=options.key_bytes,
        directory=directory,
    )
    blob = test_blob if medium.earlier is None else medium.earlier.blob
    partition = rule_file.partition_of(options, config, disk)
    rule = rule_file.plan_rule(options, config, partition, blob)
    return ProvisionPlan(
        options=options,
        blob_directory=directory,
        disk=disk,
        earlier=medium.earlier,
        erased_content=medium.content,
        keys=keys,
        rule=rule,
        notes=(*notes, *rule.notes),
    )


def _require_erasable(options: ProvisionOptions, hold: disks.Held, medium: FoundMedium) -> None:
    if medium.content is not None and options.erase is None:
        raise HotplugError(
            f"provision {hold.disk.node}: it holds {medium.content}; if all of it may be lost, say "
            f"so with --erase {hold.disk.name}"
        )


def _check_unfinished(
    options: ProvisionOptions, hold: disks.Held, earlier: EarlierRun, directory: Path
) -> None:
    """Check that the medium was begun with the same options. Raises: HotplugError."""
    operation, file = f"go on with {hold.disk.node}", shown(directory / options.blob_name)
    anew = f"remove {file} and add --erase {hold.disk.name} to begin anew"
    begun = f"{operation}: it was begun"
    key_checks.require_same_choices(options, earlier.blob, begun, f"use the same, or {anew}")
    without = marked_partition.mark_of(options.label, None, earlier.blob)
    if options.recovery_file is not None and earlier.entry.identity.uuid == without:
        raise HotplugError(
            f"{begun} without {shown(options.recovery_file)}, and a blob does not tell its key; "
            f"{anew}"
        )
