"""Record, blob and partition in mixes that boards get into: nothing is erased unasked."""

from __future__ import annotations

import os
from typing import Any

import pytest

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import mkfs
from caam_hotplug.keys import store
from caam_hotplug.provisioning import partition_record, rule_file
from unit.partition_workshop import LENGTH, MAKERS, PartitionWorkshop, recorder
from unit.provisioning.test_provision import PowerCutError, cut


def interrupted(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, where: Any, name: str,
    **more: Any,
) -> None:  # fmt: skip
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(where, name, cut)
        partition.make(**more)


def noise(partition: PartitionWorkshop, *, under_the_key: bool = False) -> bytes:
    """What somebody has encrypted. It hides what the partition showed under the key."""
    content = os.urandom(LENGTH * 512)
    partition.node.write_bytes(content)
    if under_the_key:
        for file in partition.workshop.folder.glob("partition.img.*"):
            file.write_bytes(os.urandom(LENGTH * 512))
    return content


def not_erased(partition: PartitionWorkshop, content: bytes, **more: Any) -> None:
    said = partition.refusal(**more)
    assert f"say so with --erase {partition.volume.name}" in said
    assert partition.node.read_bytes() == content


def test_a_medium_that_another_board_finished_is_not_erased_unasked(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Board A begins, board B takes the card with --erase and uses it, board A runs again."""
    interrupted(partition, monkeypatch, mkfs, "make")
    of_a = partition.record.read_bytes()
    partition.record.unlink()  # board B has blobs of its own
    partition.make(erase=partition.volume.name)
    content = noise(partition)
    partition.workshop.blob.unlink()
    partition.record.write_bytes(of_a)
    not_erased(partition, content)


def test_a_finished_partition_is_not_erased_unasked_where_its_record_was_left(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(partition, monkeypatch, partition_record, "remove")
    partition.workshop.blob.unlink()
    not_erased(partition, noise(partition, under_the_key=True))


def test_a_finished_partition_whose_blob_was_lost_gets_it_from_the_record(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(partition, monkeypatch, partition_record, "remove")
    content, blob = noise(partition), partition.workshop.blob.read_bytes()
    partition.workshop.blob.unlink()
    assert f"- write {partition.workshop.blob}" in partition.plan()
    partition.make()
    assert partition.workshop.blob.read_bytes() == blob
    assert partition.node.read_bytes() == content


def test_raw_data_that_came_before_the_mark_is_not_erased_unasked(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    recovery = partition.workshop.recovery
    interrupted(partition, monkeypatch, store, "settle_recovery", recovery_file=recovery)
    not_erased(partition, noise(partition), recovery_file=recovery)


@pytest.mark.parametrize("serial", ["0x5a", None])
def test_what_an_earlier_run_has_left_is_erased_unasked_only_if_the_disk_is_known(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, serial: str | None
) -> None:
    """Disks with one image have one identifier, and only a GPT has a mark that is ours alone."""
    partition.serial = serial
    interrupted(partition, monkeypatch, mkfs, "make")
    content = noise(partition)
    if serial is None and partition.kind == "dos":
        not_erased(partition, content)
    else:
        assert not partition.make().was_made_before


def test_what_is_no_filesystem_under_its_blob_is_not_called_made(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(partition, monkeypatch, rule_file.RulePlan, "write")
    noise(partition, under_the_key=True)
    blob = partition.workshop.blob
    said = partition.refusal()
    assert f"it holds no ext4 under the key of {blob}; remove {partition.record} and {blob}" in said


@pytest.mark.parametrize(
    "more", [{"sector_size": 4096}, {"cipher": "capi:tk(cbc(aes))-plain64"}]
)  # fmt: skip
@pytest.mark.parametrize("when", [(mkfs, "make"), (rule_file.RulePlan, "write")])
def test_what_was_begun_is_refused_with_other_settings(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, when: Any, more: dict[str, Any]
) -> None:
    interrupted(partition, monkeypatch, *when)
    said = partition.refusal(**more)
    assert "it was begun with --fs ext4 --cipher capi:tk(cbc(aes))-plain --sector-size 512" in said


@pytest.mark.parametrize("when", [(mkfs, "make"), (rule_file.RulePlan, "write")])
def test_who_gives_up_and_removes_the_files_that_are_named_can_begin_anew(
    partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, when: Any
) -> None:
    interrupted(partition, monkeypatch, *when)
    said = partition.refusal(key_bytes=32)
    files = [file for file in (partition.record, partition.workshop.blob) if file.exists()]
    assert f"remove {' and '.join(map(str, files))} to begin anew, with --erase" in said
    for file in files:
        file.unlink()
    assert not partition.make(erase=partition.volume.name).was_made_before


def test_a_label_that_a_neighbour_has_is_refused(gpt_partition: PartitionWorkshop) -> None:
    neighbour = recorder("system")
    neighbour.first, neighbour.last = 300, 399
    gpt_partition.has({1: neighbour, 2: recorder()})
    with pytest.raises(HotplugError, match="partition 1 has the label system already"):
        gpt_partition.read_table().require_changeable(2, "system")


MIGRATING = "(caam-hotplug: migrating)"


def test_a_half_migrated_partition_is_called_so(gpt_partition: PartitionWorkshop) -> None:
    gpt_partition.has({2: recorder(MIGRATING, names.UNFINISHED_TYPE)})
    said = gpt_partition.refusal()
    assert "migration was interrupted, which `caam-hotplug migrate` goes on with" in said


def test_a_half_migrated_partition_is_not_finished_by_a_record_that_was_left(
    gpt_partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(gpt_partition, monkeypatch, partition_record, "remove")
    gpt_partition.has({2: recorder(MIGRATING, names.UNFINISHED_TYPE)})
    assert "it holds a medium whose migration was interrupted" in gpt_partition.refusal()
    gpt_partition.workshop.blob.unlink()
    assert "it holds a medium whose migration was interrupted" in gpt_partition.refusal()


def test_a_label_that_leaves_no_room_may_be_replaced_by_a_shorter_one(
    gpt_partition: PartitionWorkshop,
) -> None:
    gpt_partition.has({2: recorder("x" * 36, MAKERS)})
    assert not gpt_partition.make().was_made_before
