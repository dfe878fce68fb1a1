"""The partition of a disk in use that `provision` is to make a medium of, held against others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from caam_hotplug import names
from caam_hotplug.config.loader import Config
from caam_hotplug.errors import KernelError, shown
from caam_hotplug.kernel import (
    disks,
    open_volume,
    private_node,
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
    partition_record,
    temporary_mapping,
    volume_lookup,
)
from caam_hotplug.provisioning.options import Progress, ProvisionOptions

_UNFINISHED_TYPES: Final = {"gpt": names.UNFINISHED_TYPE, "dos": "0xda"}
"""By the kind of the table. That in an MBR is of data without a filesystem, and not ours alone."""
_FINISHED_TYPES: Final = {"gpt": str(marked_partition.LINUX_DATA), "dos": "0x83"}


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
    def serial(self) -> str | None:
        """The disk's serial number, by which it differs from others with the same image."""
        return disks.serial(self.disk.disk)

    @property
    def unfinished_type(self) -> str:
        """The partition type of a medium that is not finished."""
        return _UNFINISHED_TYPES[self.table.kind]

    @property
    def finished_type(self) -> str:
        """The partition type of a finished medium."""
        return _FINISHED_TYPES[self.table.kind]

    @property
    def has_label(self) -> bool:
        """Whether the table has room for a label."""
        return self.table.kind == "gpt"

    def finished(self, label: str) -> Volume:
        """Describe the partition as the agent will see it."""
        name = label if self.has_label else None
        uuid, kind = self.entry.uuid, self.finished_type
        return replace(
            self.volume, partlabel=name, partuuid=uuid, parttype=kind, header=None, label=None,
            uuid=None,
        )  # fmt: skip

    def is_finished(self, label: str) -> bool:
        """Whether the entry is that of a finished medium with this label."""
        return self._is(self.finished_type, label)

    def is_unfinished(self, label: str) -> bool:
        """Whether the entry is that of a medium with this label that is not finished."""
        return self._is(self.unfinished_type, label)

    def _is(self, kind: str, label: str) -> bool:
        name = label if self.has_label else ""
        return (self.entry.type, self.entry.name) == (kind, name)

    @property
    def mark(self) -> str | None:
        """Describe the partition if its type is that of a medium that is not finished."""
        is_marked = self.entry.type == names.UNFINISHED_TYPE
        return marked_partition.described(self.entry.name) if is_marked else None


@contextmanager
def held_partition(
    options: ProvisionOptions, config: Config, progress: Progress, *, is_dry: bool
) -> Iterator[Target]:
    """Find the partition and check the options; hold it while the context is open.

    A killed run may have left mappings. A dry run refuses them, and any other run removes them.
    Raises: HotplugError if the options make no sense, or if the partition is the system's.
    """
    checks.prepare(f"provision {shown(options.device)}")
    begun = partition_record.find(config.blob_directory, options.blob_name)
    partuuid = None if begun is None else begun.partuuid
    found = volume_lookup.find_partition(options.device, config, "provision", partuuid)
    volume = open_volume.identify(found)
    disk = disks.disk_of(volume)
    for medium in (disk, volume):
        checks.require_not_protected(f"provision {medium.node}", medium)
    progress(f"reading {volume.node}")
    with disks.held(disk) as locked:
        if is_dry:
            temporary_mapping.require_no_leftovers(disk)
        else:
            temporary_mapping.remove_leftovers(disk)
        with opened_table(locked, volume) as (_, table, entry):
            pass
        table.require_changeable(entry.place.number, options.label)
        checks.require_provisionable(options, config, volume)
        system_partitions.require_not_the_systems(volume, entry, config.blob_directory)
        system_partitions.require_not_a_systems_name(options.label)
        with _opened(volume) as hold:
            yield Target(locked, hold, volume, table, entry)


@contextmanager
def opened_table(
    disk: disks.Held, volume: Volume
) -> Iterator[tuple[Blocks, table_in_place.Table, TableEntry]]:
    """Read the disk's table, and the partition's entry in it. Yield also the disk, to write to it.

    It is read in the same way as it is written, so that what forbids that is known early. Raises:
    HotplugError.
    """
    node, block = disk.disk.node, disks.logical_block(disk.disk)
    place = _place_of(volume)
    with private_node.opened(disk.disk) as raw:
        disk.require_same(raw)
        blocks = Blocks(raw, node)
        table = table_in_place.read(blocks, node, block, disk.disk.size * SECTOR_BYTES)
        yield blocks, table, table.entry(place)


def _place_of(volume: Volume) -> Place:
    with reported_as("find the start of", volume.node):
        attribute = f"dev/block/{volume.number}/start"
        start = number(sysfs_tree.text(sysfs_tree.root(), attribute).strip())
    return Place(volume.id.partition, Sectors(start), volume.size)


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
