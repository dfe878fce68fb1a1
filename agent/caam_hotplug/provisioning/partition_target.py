"""The partition of a disk in use that `provision` is to make a medium of, held against others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import KernelError, shown
from caam_hotplug.kernel import (
    device_users,
    disks,
    open_volume,
    sysfs_tree,
    system_partitions,
    table_in_place,
)
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.kernel.table_entry import TableEntry
from caam_hotplug.model import SECTOR_BYTES, Sectors, Volume, number
from caam_hotplug.provisioning import (
    checks,
    marked_partition,
    medium_blocks,
    rule_file,
    temporary_mapping,
    volume_lookup,
)
from caam_hotplug.provisioning.options import Progress, ProvisionOptions

_MBR_TYPE = "0x83"
"""Linux, in an MBR."""


@dataclass(frozen=True, slots=True)
class Target:
    """A partition that is held, and its entry in the table."""

    disk: disks.Held
    """Locked, so that udevd and other commands keep off."""
    hold: disks.Held
    """The partition alone."""
    volume: Volume
    """The partition, as its disk says."""
    table: table_in_place.Table
    entry: TableEntry

    @property
    def finished_type(self) -> str:
        """The partition type of a finished medium."""
        is_gpt = self.table.kind == "gpt"
        return str(marked_partition.LINUX_DATA) if is_gpt else _MBR_TYPE

    def finished(self, label: str) -> Volume:
        """Describe the partition as the agent will see it."""
        name = label if self.table.kind == "gpt" else None
        uuid, kind = self.entry.uuid, self.finished_type
        return replace(
            self.volume, partlabel=name, partuuid=uuid, parttype=kind, header=None, label=None,
            uuid=None,
        )  # fmt: skip

    def is_finished(self, label: str) -> bool:
        """Whether the entry is that of a finished medium with this label."""
        name = label if self.table.kind == "gpt" else ""
        return (self.entry.type, self.entry.name) == (self.finished_type, name)


@contextmanager
def held_partition(
    options: ProvisionOptions, config: Config, progress: Progress, *, is_dry: bool
) -> Iterator[Target]:
    """Find the partition and check the options; hold it while the context is open.

    A killed run may have left mappings. A dry run refuses them, and any other run removes them.
    Raises: HotplugError if the options make no sense, or if the partition is used or the system's.
    """
    checks.prepare(f"provision {shown(options.device)}")
    found = volume_lookup.find_partition(options.device, config, "provision")
    volume = open_volume.identify(found)
    disk = disks.disk_of(volume)
    rule_file.require_writable(options, config)
    progress(f"reading {volume.node}")
    with disks.held(disk) as locked:
        if is_dry:
            temporary_mapping.require_no_leftovers(disk)
        else:
            temporary_mapping.remove_leftovers(disk)
        table, entry = read_table(locked, volume)
        table.require_changeable(entry.place.number, options.label)
        checks.require_provisionable(options, config, volume)
        system_partitions.require_not_the_systems(volume, entry, config.blob_directory)
        system_partitions.require_not_a_systems_name(options.label)
        with _opened(volume) as hold:
            device_users.require_unused(volume, hold.reading)
            yield Target(locked, hold, volume, table, entry)


def read_table(disk: disks.Held, volume: Volume) -> tuple[table_in_place.Table, TableEntry]:
    """Read the disk's table, and the partition's entry in it. Raises: HotplugError."""
    node, block = disk.disk.node, disks.logical_block(disk.disk)
    with reported_as("find the start of", volume.node):
        attribute = f"dev/block/{volume.number}/start"
        start = number(sysfs_tree.text(sysfs_tree.root(), attribute).strip())
    with medium_blocks.opened(node, os.O_RDONLY) as raw:
        disk.require_same(raw)
        size_bytes = disk.disk.size * SECTOR_BYTES
        table = table_in_place.read(Blocks(raw, node), node, block, size_bytes)
    return table, table.entry(Place(volume.id.partition, Sectors(start), volume.size))


@contextmanager
def _opened(volume: Volume) -> Iterator[disks.Held]:
    """Open the partition, which the kernel keeps where it is meanwhile. Raises: KernelError."""
    try:
        opened = os.open(volume.node, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError("open", volume.node, error.errno or 0) from error
    hold = disks.Held(volume, opened)
    try:
        hold.require_same(opened)
        yield hold
    finally:
        hold.close()
