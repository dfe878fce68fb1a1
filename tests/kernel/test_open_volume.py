"""What the disk itself says of a volume counts, and that it is the same disk is asked of it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import open_volume, sysfs
from caam_hotplug.kernel.open_volume import OpenVolume
from caam_hotplug.model import Volume
from fakes.contract import until
from kernel.real import volume_at
from kernel.witness import detach, run

pytestmark = pytest.mark.usefixtures("nothing_left")

PARTUUID: Final = "11111111-2222-3333-4444-555555555555"
LINUX_DATA: Final = "0fc63daf-8483-4772-8e79-3d69d8477de4"
LOOP_CHANGE_FD: Final = 0x4C06
MIB: Final = 1 << 20


class Disk:
    """A loop device over a file, with the partitions that the kernel has read."""

    def __init__(self, file: Path, device: str) -> None:
        self.file = file
        self.device = device

    def partition(self, number: int = 1) -> Volume:
        """The partition as the kernel alone knows it."""
        name = f"{Path(self.device).name}p{number}"
        until(lambda: os.path.exists(f"/dev/{name}"))
        found = sysfs.volume_at(name, {}, "kernel")
        assert found is not None
        return found

    def facts(self, number: int = 1) -> tuple[str | None, str | None, str | None]:
        """Label, identifier and type of the partition, as read off the disk."""
        found = open_volume.identify(self.partition(number))
        return found.partlabel, found.partuuid, found.parttype


@contextmanager
def disk(
    folder: Path, layout: str, *options: str, size_bytes: int = 16 * MIB, sector_bytes: int = 512
) -> Iterator[Disk]:
    """Make a disk with this table, as sfdisk reads it; its cache has what was there before."""
    file = folder / "disk"
    file.touch()
    os.truncate(file, size_bytes)
    how = ("-f", "-P", "--show", "-b", str(sector_bytes), *options)
    made = Disk(file, run("losetup", *how, str(file)).strip())
    try:
        run("sfdisk", "-q", made.device, stdin=layout.encode())
        run("udevadm", "settle")
        yield made
    finally:
        detach(made.device)


def gpt(label: str = "cartridge-01") -> str:
    return f'label: gpt\nstart=1MiB, size=4MiB, uuid={PARTUUID}, name="{label}"\n'


def test_a_partition_says_what_its_table_says(tmp_path: Path) -> None:
    with disk(tmp_path, gpt("cartridge-ä 01")) as made:
        assert made.facts() == ("cartridge-ä 01", PARTUUID, LINUX_DATA)


def test_a_table_in_blocks_of_4096_bytes_is_read(tmp_path: Path) -> None:
    with disk(tmp_path, gpt(), sector_bytes=4096) as made:
        assert made.facts() == ("cartridge-01", PARTUUID, LINUX_DATA)


def test_a_label_counts_that_was_written_below_the_cache(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made, open(made.device, "rb") as cached:
        cached.read(MIB)
        run("sfdisk", "-q", "--no-tell-kernel", "--part-label", str(made.file), "1", "another")
        os.sync()
        assert made.facts()[0] == "another"


def test_a_table_of_which_only_the_copy_is_whole_is_read_from_there(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        with made.file.open("r+b") as file:
            file.seek(512)
            file.write(bytes(512))
            os.fsync(file.fileno())
        assert open_volume.identify(partition).partlabel == "cartridge-01"


@pytest.mark.parametrize("number", [1, 2, 5, 6, 7])
def test_partitions_of_an_mbr_have_its_identifier(tmp_path: Path, number: int) -> None:
    layout = (
        "label: dos\nlabel-id: 0xdeadbeef\n"
        "start=1MiB, size=1MiB, type=83\nstart=2MiB, size=1MiB, type=c\n"
        "start=4MiB, size=10MiB, type=5\n"
        "start=5MiB, size=1MiB, type=83\nstart=7MiB, size=1MiB, type=83\n"
        "start=9MiB, size=1MiB, type=8e\n"
    )
    kind = {2: "0xc", 7: "0x8e"}.get(number, "0x83")
    with disk(tmp_path, layout) as made:
        assert made.facts(number) == (None, f"deadbeef-{number:02}", kind)


def test_of_a_hybrid_table_the_gpt_counts(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        with made.file.open("r+b") as file:
            file.seek(446 + 16)  # the entry behind the protective one
            file.write(bytes.fromhex("0000000083000000") + bytes.fromhex("0008000000200000"))
            os.fsync(file.fileno())
        assert open_volume.identify(partition).partlabel == "cartridge-01"


def test_a_number_that_stands_for_another_place_now_has_no_entry(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        moved = gpt("cartridge-02").replace("start=1MiB", "start=6MiB")
        with open(partition.node, "rb"):  # so that the kernel keeps what it has
            run("sfdisk", "-q", "--no-tell-kernel", str(made.file), stdin=moved.encode())
            os.sync()
            assert open_volume.identify(partition).partlabel is None


def test_a_partition_that_has_grown_since_is_the_same(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        with open(partition.node, "rb"):
            larger = gpt().replace("size=4MiB", "size=8MiB")
            run("sfdisk", "-q", "--no-tell-kernel", str(made.file), stdin=larger.encode())
            os.sync()
            assert open_volume.identify(partition).partlabel == "cartridge-01"


HEADERS: Final = {
    "crypto_LUKS": "luks", "LVM2_member": "lvm", "linux_raid_member": "md",
}  # fmt: skip


def test_a_disk_without_a_table_is_read_too(tmp_path: Path) -> None:
    file = tmp_path / "disk"
    file.touch()
    os.truncate(file, 4 * MIB)
    run("mkfs.ext4", "-q", "-F", "-L", "LABEL", "-U", PARTUUID, str(file))
    device = run("losetup", "-f", "--show", str(file)).strip()
    try:
        found = open_volume.identify(volume_at(device))
    finally:
        detach(device)
    assert (found.partlabel, found.label, found.uuid) == (None, "LABEL", PARTUUID)
    assert found.header is None


def test_another_medium_in_place_of_an_open_one_is_noticed(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, MIB)
    device = run("losetup", "-f", "-r", "--show", str(tmp_path / "first")).strip()
    try:
        volume = volume_at(device)
        with closing(OpenVolume(volume)) as opened:
            opened.require_same()
            with (tmp_path / "second").open("rb") as second, open(device, "rb") as loop:
                fcntl.ioctl(loop, LOOP_CHANGE_FD, second.fileno())
            with pytest.raises(KernelError) as refused:
                opened.require_same()
        assert refused.value.errno == errno.ENODEV
        with pytest.raises(KernelError):
            OpenVolume(volume)
        assert OpenVolume(volume_at(device)).close() is None
    finally:
        detach(device)


def test_a_node_of_another_number_is_not_opened(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        other = replace(partition, number=volume_at(made.device).number)
        with pytest.raises(KernelError, match="another medium has its place"):
            OpenVolume(other)


def test_a_link_in_place_of_the_node_is_not_followed(tmp_path: Path) -> None:
    with disk(tmp_path, gpt()) as made:
        partition = made.partition()
        link = Path("/dev/linked")
        link.symlink_to(partition.node)
        try:
            with pytest.raises(KernelError) as refused:
                OpenVolume(replace(partition, name="linked"))
        finally:
            link.unlink()
    assert refused.value.errno == errno.ELOOP
