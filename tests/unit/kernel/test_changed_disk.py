from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import changed_disk
from caam_hotplug.model import DeviceNumber, VolumeId

NUMBER = DeviceNumber(8, 17)


@pytest.fixture
def by_number(tmp_path: Path) -> Path:
    """A folder as /sys/dev/block, with a partition of a disk and the disk itself."""
    partition = tmp_path / "devices" / "sdb" / "sdb1"
    partition.mkdir(parents=True)
    (partition / "partition").write_text("1\n")
    (partition.parent / "diskseq").write_text("12\n")
    folder = tmp_path / "block"
    folder.mkdir()
    (folder / "8:17").symlink_to(partition)
    (folder / "8:16").symlink_to(partition.parent)
    return folder


@pytest.mark.parametrize("number", [NUMBER, DeviceNumber(8, 16)])
def test_a_disk_with_another_number_has_another_medium(
    by_number: Path, number: DeviceNumber
) -> None:
    assert changed_disk.node(VolumeId(11, 1), number, by_number) == "/dev/sdb"
    assert changed_disk.node(VolumeId(12, 1), number, by_number) is None


def test_a_disk_that_has_gone_has_no_other_medium(by_number: Path) -> None:
    assert changed_disk.node(VolumeId(11, 1), DeviceNumber(8, 33), by_number) is None


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "sdb").symlink_to("/dev/null")
    with pytest.raises(KernelError, match=r"open .*sdb: Too many levels of symbolic links"):
        changed_disk.read_table(str(tmp_path / "sdb"))
