"""A disk is emptied only while nobody uses anything of it; else all of it is as before."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final, Protocol

import pytest

from caam_hotplug.errors import DeviceLockedError, KernelError, VolumeBusyError
from caam_hotplug.kernel import emptied_disk, sysfs
from caam_hotplug.model import Volume
from fakes.contract import until
from kernel.cartridges import Cartridge, cartridges
from kernel.holders import pin_in_a_namespace, process
from kernel.witness import attempt, detach, run

BLKRRPART: Final = 0x125F
FLUSHES: Final = 15
"""Field of /sys/block/NAME/stat (Documentation/block/stat.rst)."""


@pytest.fixture(scope="module")
def disk(udev_rule: None) -> Iterator[Cartridge]:
    """A disk with two partitions: one of the agent's, and a neighbour with ext4."""
    with cartridges(["cartridge-07"]) as (made,):
        made.plug()
        made.settle()
        node = f"/dev/{made.disk.name}"
        table = b'label: gpt\nstart=2048, size=4096, name="cartridge-07"\nname="neighbour"\n'
        run("sfdisk", "-q", node, stdin=table)
        run("udevadm", "settle")
        run("mkfs.ext4", "-q", f"{node}2")
        yield made


@pytest.fixture
def volume(disk: Cartridge, nothing_left: None) -> Iterator[Volume]:
    """The volume of the first partition; afterwards the disk is as it was."""
    run("udevadm", "settle")
    before = partitions(disk)
    found = sysfs.volume_at(f"{disk.disk.name}1", {}, "kernel")
    assert found is not None
    yield found
    assert partitions(disk) == before


def partitions(disk: Cartridge) -> dict[str, tuple[str, ...]]:
    facts = ("dev", "start", "size")
    return {
        folder.name: tuple((folder / fact).read_text() for fact in facts)
        for folder in disk.disk.glob(f"{disk.disk.name}*")
    }


class Use(Protocol):
    """A way to use the disk; the value is what a refusal says of it."""

    def __call__(self, node: str, folder: Path) -> AbstractContextManager[str]: ...


@contextmanager
def mounted_by_hand(node: str, folder: Path) -> Iterator[str]:
    run("mount", f"{node}2", str(folder))
    (folder / "dirty").write_bytes(b"dirty" * 1000)
    try:
        yield f"mounted at {folder}"
    finally:
        run("umount", str(folder))


@contextmanager
def mounted_elsewhere(node: str, folder: Path) -> Iterator[str]:
    """In another mount namespace only."""
    run("mount", f"{node}2", str(folder))
    with process(pin_in_a_namespace, folder):
        run("umount", str(folder))
        yield f"has it mounted at {folder} in a mount namespace of its own"


@contextmanager
def partition_open(node: str, folder: Path) -> Iterator[str]:
    with process(lambda _: opened(f"{node}2"), folder):
        yield f"has {node}2 open"


@contextmanager
def disk_open(node: str, folder: Path) -> Iterator[str]:
    with process(lambda _: opened(node), folder):
        yield f"has {node} open"


def opened(node: str) -> Iterator[None]:
    file = os.open(node, os.O_RDONLY)
    while True:
        os.pread(file, 512, 0)
        yield


@contextmanager
def disk_looped(node: str, folder: Path) -> Iterator[str]:
    assert folder
    above = run("losetup", "-f", "--show", node).strip()
    try:
        yield f"{Path(above).name} lies on it"
    finally:
        detach(above)


@contextmanager
def partition_mapped(node: str, folder: Path) -> Iterator[str]:
    assert folder
    run("dmsetup", "create", "above", "--table", f"0 8 linear {node}2 0")
    try:
        yield "mapping above lies on it"
    finally:
        run("dmsetup", "remove", "--retry", "above")


@pytest.mark.parametrize(
    "use",
    [
        mounted_by_hand, mounted_elsewhere, partition_open, disk_open, disk_looped,
        partition_mapped,
    ],
)  # fmt: skip
def test_a_disk_of_which_anything_is_in_use_is_not_emptied_and_its_users_are_named(
    disk: Cartridge, volume: Volume, use: Use, tmp_path: Path
) -> None:
    with use(f"/dev/{disk.disk.name}", tmp_path) as user, pytest.raises(VolumeBusyError) as refused:
        emptied_disk.empty(volume)
    assert user in "; ".join(refused.value.holders)


def test_who_mounts_or_maps_a_neighbour_is_known_before_anything_is_done(
    disk: Cartridge, volume: Volume, tmp_path: Path
) -> None:
    node = f"/dev/{disk.disk.name}"
    assert emptied_disk.users(volume) == []
    for use in (mounted_by_hand, disk_looped, partition_mapped):
        with use(node, tmp_path) as user:
            assert emptied_disk.users(volume) == [user]


def test_a_disk_that_a_program_has_locked_is_not_emptied(disk: Cartridge, volume: Volume) -> None:
    with open(f"/dev/{disk.disk.name}", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DeviceLockedError, match="a program has locked it"):
            emptied_disk.empty(volume)


def test_another_medium_in_its_place_is_not_emptied(volume: Volume) -> None:
    other = Volume(
        **{
            **{name: getattr(volume, name) for name in volume.__slots__},
            "id": type(volume.id)(volume.id.diskseq + 1000, 1),
        }
    )
    with pytest.raises(KernelError) as refused:
        emptied_disk.empty(other)
    assert refused.value.errno == errno.ENODEV


def mbr(*partitions: tuple[int, int, int]) -> bytes:
    """Return a table of partitions, each given by its type, start and size."""
    entries = b"".join(struct.pack("<4xB3xII", *each) for each in partitions)
    return bytes(446) + entries.ljust(64, b"\0") + b"\x55\xaa"


@pytest.mark.parametrize(
    ("sectors", "numbers"),
    [
        ({0: mbr((0x83, 2048, 8192), (0x83, 4096, 1024))}, [1, 2]),
        (
            {
                0: mbr((0x83, 2048, 2048), (5, 4096, 8192)),
                4096: mbr((0x83, 64, 1024), (5, 2048, 2048)),
                6144: mbr((0x83, 64, 1024)),
            },
            [1, 2, 5, 6],
        ),
    ],
    ids=["one in another, as on a hybrid image", "extended"],
)
def test_a_disk_in_use_gets_back_partitions_that_the_kernel_takes_from_a_table_only(
    disk: Cartridge, volume: Volume, sectors: dict[int, bytes], numbers: list[int], tmp_path: Path
) -> None:
    node = f"/dev/{disk.disk.name}"
    with open(node, "rb") as file:
        before = file.read(6145 * 512)
    try:
        with open(node, "r+b") as file:
            for at, content in sectors.items():
                os.pwrite(file.fileno(), content, at * 512)
        run("udevadm", "settle")
        run("blockdev", "--rereadpt", node)
        run("udevadm", "settle")
        expected = partitions(disk)
        assert sorted(int(name.removeprefix(disk.disk.name)) for name in expected) == numbers
        with disk_open(node, tmp_path), pytest.raises(VolumeBusyError):
            emptied_disk.empty(volume)
        assert {name: each[1:] for name, each in partitions(disk).items()} == {
            name: each[1:] for name, each in expected.items()
        }
        emptied = emptied_disk.empty(volume)
        assert partitions(disk) == {}
        emptied.restore()
        run("udevadm", "settle")
    finally:
        with open(node, "r+b") as file:
            file.write(before)
        run("udevadm", "settle")
        run("blockdev", "--rereadpt", node)
        run("udevadm", "settle")


def test_nobody_can_begin_to_use_an_emptied_disk_until_it_is_restored(
    disk: Cartridge, volume: Volume, tmp_path: Path
) -> None:
    node = f"/dev/{disk.disk.name}"
    emptied = emptied_disk.empty(volume)
    try:
        assert partitions(disk) == {}
        assert attempt("mount", node, str(tmp_path)).returncode != 0
        assert attempt("dmsetup", "create", "above", "--table", f"0 8 linear {node} 0").returncode
        # At the close udevd would read the partitions.
        with open(node, "r+b") as file, pytest.raises(OSError, match="busy"):
            fcntl.ioctl(file, BLKRRPART)
        run("udevadm", "settle")
        assert partitions(disk) == {}
    finally:
        found = emptied.restore()
    assert [each.id.partition for each in found] == [1, 2]
    assert found[0].id == volume.id
    run("udevadm", "settle")


def test_a_disk_that_was_given_back_can_be_read_by_others_and_be_restored(
    disk: Cartridge, volume: Volume
) -> None:
    emptied = emptied_disk.empty(volume)
    emptied.close()
    assert partitions(disk) == {}
    run("blockdev", "--rereadpt", f"/dev/{disk.disk.name}")
    until(lambda: len(partitions(disk)) == 2)
    run("udevadm", "settle")
    emptied_disk.empty(volume).close()
    assert [each.id.partition for each in emptied.restore()] == [1, 2]
    run("udevadm", "settle")


def test_the_cache_of_an_emptied_disk_was_flushed(disk: Cartridge, volume: Volume) -> None:
    def flushes() -> int:
        return int((disk.disk / "stat").read_text().split()[FLUSHES])

    before = flushes()
    emptied = emptied_disk.empty(volume)
    try:
        assert flushes() > before
    finally:
        emptied.restore()
        run("udevadm", "settle")


def test_a_disk_is_stopped_while_it_is_held_and_its_partitions_stay_away(
    disk: Cartridge, volume: Volume
) -> None:
    emptied = emptied_disk.empty(volume)
    try:
        emptied.power_off()
        run("udevadm", "settle")
        assert partitions(disk) == {}
    finally:
        emptied.restore()
        run("udevadm", "settle")


@pytest.mark.parametrize("is_held", [True, False])
def test_a_stopped_disk_is_started_when_its_partitions_are_wanted_again(
    disk: Cartridge, volume: Volume, is_held: bool
) -> None:
    emptied = emptied_disk.empty(volume)
    emptied.power_off()
    run("udevadm", "settle")
    if not is_held:  # as after a restart of the agent
        emptied.close()
        emptied = emptied_disk.empty(volume)
    assert [each.id.partition for each in emptied.restore()] == [1, 2]
    run("udevadm", "settle")  # it may look at the disk now, as it was stopped and closed
    read = ("dd", f"if=/dev/{disk.disk.name}1", "of=/dev/null", "iflag=direct", "count=8")
    assert attempt(*read).returncode == 0
