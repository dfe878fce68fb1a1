"""The partition that is to be made is found, held, and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from caam_hotplug.errors import DeviceInUseError, DmError, HotplugError, KernelError
from caam_hotplug.kernel import (
    device_users,
    disks,
    open_volume,
    private_node,
    sysfs,
    system_partitions,
    udev,
)
from caam_hotplug.provisioning import (
    partition_record,
    partition_target,
    provision_partition,
    temporary_mapping,
)
from unit.partition_workshop import PartitionWorkshop, recorder
from unit.provisioning.test_provision import PowerCutError, cut
from unit.provisioning.test_volume_lookup import NoDevices
from unit.workshop import LABEL

HELD_PARTITION = partition_target.held_partition


def really(made: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch) -> PartitionWorkshop:
    """The partition, which the command has to find and to hold by itself."""
    for name in ("_COMMAND_LINE", "_FSTAB", "_LOADER"):
        monkeypatch.setattr(system_partitions, name, made.workshop.folder / name)
    monkeypatch.setattr(provision_partition, "held_partition", HELD_PARTITION)
    monkeypatch.setattr(partition_target, "_opened", made.opened)
    monkeypatch.setattr(sysfs, "there", lambda: iter([made.identify(made.volume)]))
    monkeypatch.setattr(udev, "Devices", NoDevices)
    monkeypatch.setattr(open_volume, "identify", made.identify)
    monkeypatch.setattr(disks, "disk_of", lambda _volume: made.whole)
    made.device = LABEL if made.kind == "gpt" else "1234abcd-02"
    return made


@pytest.fixture
def found(partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch) -> PartitionWorkshop:
    return really(partition, monkeypatch)


@pytest.fixture
def gpt_found(
    gpt_partition: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> PartitionWorkshop:
    return really(gpt_partition, monkeypatch)


def test_the_same_command_with_a_rule_goes_on_after_a_cut_and_finds_it_made(
    found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = found.workshop.drop_in(f"{LABEL}.toml")
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(found.workshop, "announce", cut)
        found.make(rule_file=file)
    assert not found.make(rule_file=file).was_made_before
    assert found.make(rule_file=file).was_made_before


def test_another_rule_of_the_label_is_refused(found: PartitionWorkshop) -> None:
    file = found.workshop.drop_in("a.toml", f'[[rule]]\nname = "{LABEL}"\n')
    said = found.refusal(rule_file=file.with_name(f"{LABEL}.toml"))
    assert f"there is a rule '{LABEL}' already" in said


def test_a_label_by_which_the_system_finds_its_root_is_refused(found: PartitionWorkshop) -> None:
    (found.workshop.folder / "_COMMAND_LINE").write_text("root=PARTLABEL=rootfs ro rootwait\n")
    said = found.refusal(label="rootfs")
    assert "the kernel's command line has root=PARTLABEL=rootfs; choose another" in said


def test_fstab_may_mount_what_is_unlocked_by_the_filesystems_label(
    found: PartitionWorkshop,
) -> None:
    (found.workshop.folder / "_FSTAB").write_text(f"LABEL={LABEL} /var/lib ext4 noauto 0 2\n")
    found.make()


def test_a_name_with_a_blank_in_fstab_is_read_as_mount_reads_it(
    gpt_found: PartitionWorkshop,
) -> None:
    gpt_found.has({2: recorder("Boot A")})
    gpt_found.device = "Boot A"
    fstab = gpt_found.workshop.folder / "_FSTAB"
    fstab.write_text("PARTLABEL=Boot\\040A /boot ext4 noauto 0 0\n")
    assert "mounts it at /boot" in gpt_found.refusal()


@pytest.mark.parametrize("above", [0, 1])
def test_a_partition_that_fstab_mounts_below_the_blobs_is_refused(
    gpt_found: PartitionWorkshop, above: int
) -> None:
    """It need not be mounted now."""
    folder = (gpt_found.workshop.blobs, gpt_found.workshop.folder)[above]
    fstab = gpt_found.workshop.folder / "_FSTAB"
    fstab.write_text(f"PARTLABEL={LABEL} {folder} ext4 noauto 0 2\n")
    assert f"mounts it at {folder}" in gpt_found.refusal()


def test_a_table_that_cannot_be_written_is_found_before_anything_is_made(
    found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as under a device cgroup, where the private node does not open."""

    @contextmanager
    def fails(_disk: object) -> Iterator[int]:
        raise KernelError("open", "/dev/disk", 1)
        yield 0

    monkeypatch.setattr(private_node, "opened", fails)
    assert "open /dev/disk" in found.refusal()


def test_a_write_protected_disk_is_called_so(
    found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "disk_of", lambda _volume: replace(found.whole, read_only=True))
    assert "the medium is write-protected" in found.refusal()


def busy(*_: object) -> None:
    raise DeviceInUseError("use it: it is in use: mapping caam-7-2 lies on it")


def test_a_finished_filesystem_that_the_agent_has_mounted_is_finished_by_the_same_command(
    found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut with entry written and record there: at the next boot the agent mounts it."""
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(partition_record, "remove", cut)
        found.make()
    monkeypatch.setattr(device_users, "require_unused", busy)
    found.make()
    assert not found.record.exists()
    assert found.make().was_made_before


def test_who_uses_a_partition_that_cannot_be_mapped_is_named(
    found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    found.make()

    @contextmanager
    def fails(*_: object, **_more: object) -> Iterator[None]:
        raise DmError("load table of mapping", "x", 16)
        yield

    monkeypatch.setattr(temporary_mapping, "through_key", fails)
    monkeypatch.setattr(device_users, "require_unused", busy)
    with pytest.raises(DeviceInUseError, match="it is in use: "):
        found.make()


@pytest.mark.parametrize("when", ["remove", "create"])
def test_the_same_command_that_changes_the_label_finds_the_partition_again(
    gpt_found: PartitionWorkshop, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(partition_record, when, cut)
        gpt_found.make(label="archive")
    gpt_found.make(label="archive")
    assert [file.name for file in gpt_found.workshop.blobs.iterdir()] == ["archive.bb"]


def test_a_label_that_nobody_has_is_not_found(gpt_found: PartitionWorkshop) -> None:
    gpt_found.device = "nothing"
    with pytest.raises(HotplugError, match="no partition has this label or PARTUUID"):
        gpt_found.make()
