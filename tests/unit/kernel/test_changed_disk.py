from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel import changed_disk, sysfs_tree
from caam_hotplug.model import DeviceNumber, VolumeId

NUMBER = DeviceNumber(8, 17)


@pytest.fixture
def root(tmp_path: Path) -> Iterator[int]:
    """A tree as /sys, with a partition of a disk and the disk itself."""
    partition = tmp_path / "devices" / "sdb" / "sdb1"
    partition.mkdir(parents=True)
    (partition / "partition").write_text("1\n")
    (partition.parent / "diskseq").write_text("12\n")
    folder = tmp_path / "dev" / "block"
    folder.mkdir(parents=True)
    (folder / "8:17").symlink_to("../../devices/sdb/sdb1")
    (folder / "8:16").symlink_to("../../devices/sdb")
    opened = os.open(tmp_path, os.O_PATH)
    yield opened
    os.close(opened)


@pytest.mark.parametrize("number", [NUMBER, DeviceNumber(8, 16)])
def test_a_disk_with_another_number_has_another_medium(root: int, number: DeviceNumber) -> None:
    assert changed_disk.node(VolumeId(11, 1), number, root) == "/dev/sdb"
    assert changed_disk.node(VolumeId(12, 1), number, root) is None


def test_a_disk_that_has_gone_has_no_other_medium(root: int) -> None:
    assert changed_disk.node(VolumeId(11, 1), DeviceNumber(8, 33), root) is None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_disk_whose_files_cannot_be_read_is_not_known(
    root: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refuse(*_: object) -> str:
        raise OSError(number, "refused")

    monkeypatch.setattr(sysfs_tree, "text", refuse)
    with pytest.raises(UnknownError, match="look at the disk of device 8:17"):
        changed_disk.node(VolumeId(11, 1), NUMBER, root)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "sdb").symlink_to("/dev/null")
    with pytest.raises(KernelError, match=r"open .*sdb: Too many levels of symbolic links"):
        changed_disk.read_table(str(tmp_path / "sdb"))
