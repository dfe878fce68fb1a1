"""A write that has failed is known at the release, though programs have seen the error before."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.errors import MountBusyError, WritesLostError
from caam_hotplug.kernel import mount, mountinfo
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.kernel.mount_places import MountPlaces
from caam_hotplug.kernel.write_watch import WriteWatch
from caam_hotplug.model import DeviceNumber, Mapping
from kernel.test_mount import without_passing_for_others
from kernel.witness import detach, run

NAME: Final = "sick"
FLUSHES: Final = 15
"""Field of /sys/block/NAME/stat (Documentation/block/stat.rst)."""
MAKERS: Final = {
    "ext4": ("mkfs.ext4", "-q"),
    "vfat": ("mkfs.vfat",),
    "exfat": ("mkfs.exfat",),
}


class Medium:
    """A mounted filesystem over a device whose writes can be made to fail."""

    def __init__(self, root: Path, kind: str, held: ExitStack) -> None:
        folder = Path(held.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        file = folder / "medium"
        file.touch()
        os.truncate(file, 16 << 20)
        self.below = run("losetup", "-f", "--show", str(file)).strip()
        held.callback(detach, self.below)
        self._sectors = (16 << 20) // 512
        run("dmsetup", "create", NAME, "--table", self._table("linear {below} 0"))
        held.callback(run, "dmsetup", "remove", "--retry", NAME)
        self.node = os.path.realpath(f"/dev/mapper/{NAME}")
        run(*MAKERS[kind], self.node)
        self.point = root / NAME
        self.point.mkdir()
        status = os.stat(self.node)
        number = DeviceNumber(os.major(status.st_rdev), os.minor(status.st_rdev))
        self.watch = WriteWatch(Mapping(NAME, "", number, (), 0), root, MountPlaces(root))
        held.callback(self.watch.close)
        target = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            mount.mount(self.node, kind, target, read_only=False, options=(), filesystem_options=())
        finally:
            os.close(target)
        held.callback(mount.unmount, str(self.point), lazily=True)
        self.watch.mounted()

    def _table(self, target: str) -> str:
        return f"0 {self._sectors} {target.format(below=self.below)}"

    def becomes(self, target: str) -> None:
        run("dmsetup", "suspend", "--noflush", "--nolockfs", NAME)
        run("dmsetup", "reload", NAME, stdin=self._table(target).encode())
        run("dmsetup", "resume", NAME)

    def fails_writes(self) -> None:
        self.becomes("flakey {below} 0 0 1000 1 error_writes")

    def recovers(self) -> None:
        self.becomes("linear {below} 0")

    def write(self) -> None:
        (self.point / "file").write_bytes(b"written" * 10_000)

    def numbers(self) -> set[int]:
        return {each.identity for each in mountinfo.mounts() if each.point == str(self.point)}

    def is_mounted(self) -> bool:
        return self.point.is_mount()


@pytest.fixture(params=MAKERS)
def medium(
    request: pytest.FixtureRequest, udev_rule: None, nothing_left: None, tmp_path: Path
) -> Iterator[Medium]:
    with ExitStack() as held:
        yield Medium(tmp_path, request.param, held)


def test_what_was_written_is_on_the_medium_and_nothing_is_lost(medium: Medium) -> None:
    medium.write()
    medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    assert not medium.is_mounted()
    assert medium.watch.lost == ""


def test_a_write_that_failed_is_seen_before_the_unmount_and_at_each_later_one(
    medium: Medium,
) -> None:
    medium.fails_writes()
    medium.write()
    for _ in range(2):
        with pytest.raises(WritesLostError, match="not all that was written to it has reached"):
            medium.watch.unmount(NAME, medium.numbers(), anyway=False)
        assert medium.is_mounted()
    medium.recovers()
    with pytest.raises(WritesLostError, match="Input/output error"):
        medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    medium.watch.unmount(NAME, medium.numbers(), anyway=True)
    assert not medium.is_mounted()


def fsync_it(medium: Medium) -> None:
    file = os.open(medium.point / "file", os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def sync_all(_medium: Medium) -> None:
    os.sync()


def syncfs_it(medium: Medium) -> None:
    directory = os.open(medium.point, os.O_RDONLY)
    try:
        Libc.syncfs(directory)
    finally:
        os.close(directory)


@pytest.mark.parametrize("consume", [fsync_it, sync_all, syncfs_it])
def test_a_write_whose_failure_a_program_has_seen_is_seen_too(
    medium: Medium, consume: Callable[[Medium], None]
) -> None:
    medium.fails_writes()
    medium.write()
    try:
        consume(medium)
    except OSError as error:
        assert error.errno == 5
    medium.recovers()
    with pytest.raises(WritesLostError):
        medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    medium.watch.unmount(NAME, medium.numbers(), anyway=True)


def test_a_write_that_fails_as_the_filesystem_ends_is_seen(medium: Medium) -> None:
    medium.write()
    syncfs_it(medium)
    medium.fails_writes()
    (medium.point / "late").touch()
    medium.watch.unmount(NAME, medium.numbers(), anyway=True)
    assert not medium.is_mounted()
    assert "not all that was written" in medium.watch.lost


def test_a_medium_that_answers_nothing_any_more_can_be_unmounted_and_has_lost_data(
    medium: Medium,
) -> None:
    medium.write()
    medium.becomes("error")
    medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    assert not medium.is_mounted()
    assert "not all that was written" in medium.watch.lost


def test_a_mount_in_use_stays_and_nothing_keeps_it_afterwards(medium: Medium) -> None:
    with (medium.point / "file").open("wb"), pytest.raises(MountBusyError):
        medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    assert medium.is_mounted()
    mount.unmount(str(medium.point))
    assert not medium.is_mounted()


def test_the_devices_cache_is_flushed(medium: Medium) -> None:
    def flushes() -> int:
        stat = Path("/sys/class/block", Path(medium.below).name, "stat")
        return int(stat.read_text().split()[FLUSHES])

    medium.write()
    before = flushes()
    medium.watch.unmount(NAME, medium.numbers(), anyway=False)
    assert flushes() > before


@pytest.mark.parametrize("medium", ["ext4"], indirect=True)
@pytest.mark.parametrize("fails", [False, True])
def test_a_filesystem_whose_root_lets_no_other_in_is_flushed_through_its_device(
    medium: Medium, *, fails: bool
) -> None:
    os.chown(medium.point, 1000, 1000)
    medium.point.chmod(0o700)
    medium.write()
    if fails:
        medium.fails_writes()
    without_passing_for_others(lambda: medium.watch.unmount(NAME, medium.numbers(), anyway=True))
    assert not medium.is_mounted()
    assert bool(medium.watch.lost) is fails


def test_where_another_mount_is_seen_nothing_is_unmounted(medium: Medium) -> None:
    medium.watch.unmount("another", medium.numbers(), anyway=False)
    medium.watch.unmount(NAME, {0}, anyway=False)
    assert medium.is_mounted()
    assert medium.watch.lost == ""
