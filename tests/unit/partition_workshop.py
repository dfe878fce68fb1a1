"""One partition of a disk in use, of which a medium is made; both are images, see `workshop`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import disks, private_node, table_in_place, uevent_request
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.model import DevType, Sectors, Volume, VolumeId
from caam_hotplug.provisioning import partition_record, partition_target, provision_partition
from caam_hotplug.provisioning.options import ProvisionOptions
from caam_hotplug.provisioning.partition_target import Target
from unit.kernel.disk_images import Gpt, Part, mbr
from unit.kernel.test_mbr_in_place import entry as mbr_entry
from unit.workshop import LABEL, Workshop, _Held, disk_of

FIRST, LENGTH = 2048, 2 << 11
PLACE: Final = Place(2, Sectors(FIRST), Sectors(LENGTH))
MAKERS: Final = "4d21b016-b534-45c2-a9fb-5c16e091fd2d"
"""A type that the image's maker has chosen."""
SIZE: Final = 4 << 20


def recorder(name: str = LABEL, kind: str = MAKERS) -> Part:
    """The partition, in a GPT."""
    return Part(name, FIRST, FIRST + LENGTH - 1, kind)


class PartitionWorkshop:
    """A disk's image, with a table, and its partition, which is a file of its own."""

    def __init__(self, workshop: Workshop, kind: str) -> None:
        self.workshop = workshop
        self.kind = kind
        self.disk = workshop.folder / "disk.img"
        self.node = workshop.folder / "partition.img"
        self.serial: str | None = "0x5a"
        """The disk's."""
        if kind == "gpt":
            self.has({2: recorder()})
        else:
            table = mbr([mbr_entry(100, 1000), mbr_entry(FIRST, LENGTH, 0x0C)])
            self.disk.write_bytes(table + bytes(SIZE - 512))
        self.node.touch()
        os.truncate(self.node, LENGTH * 512)
        self.device = str(self.node)
        """What the command is given."""
        self.changed: list[str] = []
        """The partitions of which a change was reported."""

    def has(self, parts: dict[int, Part]) -> None:
        """Give the disk a GPT with these partitions."""
        self.disk.write_bytes(Gpt(parts, size=SIZE).image())

    @property
    def volume(self) -> Volume:
        """The partition as udev and the kernel know it."""
        disk = disk_of(self.node)
        return replace(disk, id=VolumeId(7, 2), devtype=DevType.PARTITION, partlabel=LABEL)

    @property
    def record(self) -> Path:
        """The record of what is not finished."""
        return partition_record.file(self.workshop.blobs, f"{LABEL}.bb")

    @property
    def whole(self) -> Volume:
        """The partition's disk."""
        return replace(disk_of(self.disk), serial=self.serial)

    def read_table(self) -> table_in_place.Table:
        """The table as it is now."""
        file = os.open(self.disk, os.O_RDONLY)
        try:
            return table_in_place.read(Blocks(file, "disk"), str(self.disk), 512, SIZE)
        finally:
            os.close(file)

    @property
    def type(self) -> str:
        """The partition's type."""
        return self.read_table().entry(PLACE).type

    @contextmanager
    def opened(self, volume: Volume) -> Iterator[disks.Held]:
        """The partition's image."""
        with closing(_Held(volume, os.open(self.node, os.O_RDONLY))) as hold:
            yield hold

    def identify(self, volume: Volume) -> Volume:
        """The partition with what the table says of it."""
        entry = self.read_table().entry(PLACE)
        return replace(
            volume,
            partlabel=entry.name or None,
            partuuid=entry.uuid,
            parttype=entry.type,
            identified=True,
        )

    @contextmanager
    def held(self, *_options: object, **_more: object) -> Iterator[Target]:
        """The partition, as `held_partition` yields it."""
        table = self.read_table()
        holds = [_Held(each, os.open(each.node, os.O_RDONLY)) for each in (self.whole, self.volume)]
        try:
            yield Target(*holds, self.volume, table, table.entry(PLACE))
        finally:
            for hold in holds:
                hold.close()

    def options(self, **more: Any) -> ProvisionOptions:
        """The options of `provision` for the partition. `more`: as for `Workshop.options`."""
        return replace(self.workshop.options(self.node, **more), device=self.device)

    def make(self, **more: Any) -> provision_partition.ProvisionResult:
        """`provision` the partition. `more`: as for `Workshop.options`."""
        return provision_partition.provision(
            self.options(**more),
            self.workshop.config(),
            self.workshop.steps.append,
            self.workshop.announce,
        )

    def plan(self, **more: Any) -> list[str]:
        """`provision --dry-run` of the partition."""
        plan = provision_partition.dry_run(self.options(**more), self.workshop.config(), print)
        return list(plan.lines())

    def refusal(self, **more: Any) -> str:
        """The message of a command that changes nothing, dry or not."""
        before = self.workshop.contents()
        said = set()
        for command in (self.make, self.plan):
            with pytest.raises(HotplugError) as refused:
                command(**more)
            said.add(str(refused.value))
        assert self.workshop.contents() == before
        (message,) = said
        return message


def prepared_partition(
    workshop: Workshop, kind: str, monkeypatch: pytest.MonkeyPatch
) -> PartitionWorkshop:
    """A partition in a table of that kind; nothing outside of the workshop is touched."""
    made = PartitionWorkshop(workshop, kind)

    @contextmanager
    def opened(_disk: Volume) -> Iterator[int]:
        file = os.open(made.disk, os.O_RDWR)
        yield file
        os.close(file)

    monkeypatch.setattr(private_node, "opened", opened)
    monkeypatch.setattr(partition_target, "_place_of", lambda _volume: PLACE)
    monkeypatch.setattr(disks, "logical_block", lambda _disk: 512)
    monkeypatch.setattr(provision_partition, "held_partition", made.held)
    monkeypatch.setattr(uevent_request, "changed", lambda volume: made.changed.append(volume.name))
    return made
