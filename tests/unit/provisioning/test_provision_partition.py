"""What is decided for one partition of a disk in use; on images, see `workshop`."""

from __future__ import annotations

import os
from typing import Any
from uuid import UUID

import pytest

from caam_hotplug import names
from caam_hotplug.kernel import mkfs
from caam_hotplug.keys import backends, store
from caam_hotplug.provisioning import partition_record, rule_file
from unit.kernel.disk_images import LINUX, Gpt
from unit.partition_workshop import MAKERS, SIZE, PartitionWorkshop, recorder
from unit.provisioning.test_provision import PowerCutError, cut
from unit.workshop import LABEL

FINISHED = {"gpt": LINUX, "dos": "0x83"}
BEFORE = {"gpt": MAKERS, "dos": "0xc"}
UNFINISHED = {"gpt": names.UNFINISHED_TYPE, "dos": "0xda"}


def test_a_blank_partition_is_made_and_its_change_reported(partition: PartitionWorkshop) -> None:
    done = partition.make()
    assert (done.was_made_before, done.partition) == (False, partition.volume.node)
    assert partition.type == FINISHED[partition.read_table().kind]
    assert [file.name for file in partition.workshop.blobs.iterdir()] == [f"{LABEL}.bb"]
    assert partition.changed == [partition.volume.name]


def test_a_partition_that_is_made_is_found_made(partition: PartitionWorkshop) -> None:
    partition.make()
    before = partition.workshop.contents()
    heading, *steps = partition.plan()
    assert heading.endswith(f"was made before; its key is in {partition.workshop.blob}. Steps:")
    assert steps == []
    assert partition.make().was_made_before
    assert partition.workshop.contents() == before


CUTS = {
    "the key is in its file": (backends, "seal"),
    "the record is there": (store, "settle_recovery"),
    "the partition is marked": (mkfs, "make"),
    "the filesystem is made": (store.Folder, "write"),
    "the blob has its name": (rule_file.RulePlan, "write"),
    "the entry is written": (partition_record, "remove"),
}


@pytest.mark.parametrize("when", CUTS)
def test_cut_anywhere_the_same_command_completes_it_under_the_same_key(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    workshop, kind = partition.workshop, partition.read_table().kind
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(*CUTS[when], cut)
        partition.make(recovery_file=workshop.recovery)
    written = workshop.recovery.read_bytes()
    is_finished = when == "the entry is written"
    if partition.record.exists() and not is_finished:
        assert partition.type in {UNFINISHED[kind], BEFORE[kind]}
    sealed = partition_record.find(workshop.blobs, f"{LABEL}.bb")
    heading, *steps = partition.plan(recovery_file=workshop.recovery)
    assert heading.endswith("would be finished in these steps:") is (sealed is not None)
    assert any(step.startswith("- erase ") for step in steps) is not workshop.blob.exists()
    done = partition.make(recovery_file=workshop.recovery)
    assert (done.was_made_before, partition.type) == (False, FINISHED[kind])
    assert sealed is None or workshop.blob.read_bytes() == sealed.blob
    assert workshop.recovery.read_bytes() == written
    assert not partition.record.exists()
    assert not [each.name for each in workshop.folder.iterdir() if each.name.startswith(".")]


def begun(partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, **more: Any) -> None:
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(mkfs, "make", cut)
        partition.make(**more)


def test_what_was_begun_is_refused_with_other_keys(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(partition, monkeypatch)
    said = partition.refusal(key_bytes=32)
    assert "it was begun with --backend tagged --key-bytes 16 --seal ecb, not with" in said
    said = partition.refusal(recovery_file=partition.workshop.recovery)
    assert "it was begun with another recovery file, or none; use the same, or remove " in said


def test_a_record_of_another_disk_is_refused(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(partition, monkeypatch)
    content = bytearray(partition.disk.read_bytes())
    at = 440 if partition.read_table().kind == "dos" else None
    if at is None:
        image = Gpt({2: recorder()}, size=SIZE, disk=UUID(int=7)).image()
        partition.disk.write_bytes(image)
    else:
        content[at] ^= 1
        partition.disk.write_bytes(content)
    said = partition.refusal()
    assert f"{partition.record} says that {LABEL} was begun on partition 2 of another disk" in said


def test_a_blob_that_another_command_made_meanwhile_is_not_replaced(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(partition, monkeypatch)
    record = partition_record.find(partition.workshop.blobs, f"{LABEL}.bb")
    assert record is not None
    partition.workshop.blob.write_bytes(record.blob[:-1] + bytes([record.blob[-1] ^ 1]))
    assert "is of another medium, and " in partition.refusal()


def test_content_is_erased_by_the_partitions_name_alone(partition: PartitionWorkshop) -> None:
    with partition.node.open("r+b") as file:
        file.seek(1 << 20)
        file.write(os.urandom(1 << 20))
    said = partition.refusal()
    assert "it holds something that no program here knows, at byte " in said
    assert said.endswith(f"say so with --erase {partition.volume.name}")
    partition.make(erase=partition.volume.name)


def test_the_rule_of_a_partition_matches_it(partition: PartitionWorkshop) -> None:
    file = partition.workshop.drop_in(f"{LABEL}.toml")
    partition.make(rule_file=file)
    is_gpt = partition.read_table().kind == "gpt"
    wanted = f'partlabel = "{LABEL}"' if is_gpt else 'partuuid = "1234abcd-02"'
    assert wanted in file.read_text()
