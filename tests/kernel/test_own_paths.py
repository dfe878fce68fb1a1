"""A medium whose rule names a path: mounted there by an installed agent's code, and released."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from fakes.contract import until
from kernel.agents import ROOM, Room, keys, mappings, mounts
from kernel.cartridges import HELLO, TEXT
from kernel.holders import hold_open, process
from kernel.witness import run

SRV: Final = ROOM / "srv"
POINT: Final = SRV / "recorder"
AT: Final = f'mount.path = "{POINT}"\n'


@pytest.fixture
def fixed(room: Room) -> Iterator[Room]:
    """A room whose rule names a path; afterwards nothing is in the directory of that."""
    SRV.mkdir(mode=0o755)
    room.medium.plug()
    room.medium.settle()
    room.medium.restore()  # an ext4 keeps the number of errors that earlier pulls have caused
    room.medium.pull()
    room.configure(AT)
    room.agent.start()
    yield room
    if room.medium.is_plugged:
        room.medium.pull()
    until_released()
    assert list(SRV.iterdir()) == []


def until_released() -> None:
    until(lambda: not mappings() and not keys() and not at(POINT))


def at(point: Path) -> list[str]:
    return [line for line in mounts() if f" {point} " in line]


def plug(room: Room) -> None:
    room.agent.forget()
    room.medium.plug()


def served(room: Room, point: Path = POINT) -> None:
    room.agent.until_said(f"mounted: at {point}, ")
    assert (point / HELLO).read_bytes() == TEXT
    assert len(at(point)) == 1


def restart(room: Room, more: str) -> None:
    """Kill the agent, and start it with other keys in its rule."""
    room.agent.kill()
    room.configure(more)
    room.agent.start()


def test_a_missing_directory_is_made_and_goes_with_the_medium(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    fixed.medium.pull()
    until_released()
    until(lambda: not POINT.exists())


@pytest.mark.parametrize("mode", [0o755, 0o500])
def test_an_empty_directory_is_used_and_kept(fixed: Room, mode: int) -> None:
    POINT.mkdir()
    POINT.chmod(mode)
    os.chown(POINT, 1000, 1000)
    before = POINT.stat()
    plug(fixed)
    served(fixed)
    fixed.agent.stop()
    after = POINT.stat()
    assert (after.st_ino, after.st_uid) == (before.st_ino, 1000)
    assert stat.S_IMODE(after.st_mode) == mode
    POINT.rmdir()


def others_may_write() -> Callable[[], object]:
    SRV.chmod(0o1777)
    return lambda: SRV.chmod(0o755)


def another_owns_it() -> Callable[[], object]:
    os.chown(SRV, 1000, 1000)
    return lambda: os.chown(SRV, 0, 0)


def it_is_a_link() -> Callable[[], object]:
    SRV.rename(ROOM / "real")
    SRV.symlink_to("real")

    def end() -> None:
        SRV.unlink()
        (ROOM / "real").rename(SRV)

    return end


def it_is_missing() -> Callable[[], object]:
    SRV.rmdir()
    return lambda: SRV.mkdir(mode=0o755)


def it_is_read_only() -> Callable[[], object]:
    run("mount", "-t", "tmpfs", "-o", "ro,mode=755", "tmpfs", str(SRV))
    return lambda: run("umount", str(SRV))


def there_is_content() -> Callable[[], object]:
    (POINT / "content").mkdir(parents=True)

    def end() -> None:
        (POINT / "content").rmdir()
        POINT.rmdir()

    return end


def there_is_a_link() -> Callable[[], object]:
    POINT.symlink_to("/run")
    return POINT.unlink


def there_is_a_mount() -> Callable[[], object]:
    POINT.mkdir()
    run("mount", "-t", "tmpfs", "tmpfs", str(POINT))

    def end() -> None:
        run("umount", str(POINT))
        POINT.rmdir()

    return end


@pytest.mark.parametrize(
    ("obstacle", "says"),
    [
        (others_may_write, f"{SRV} is a place where everyone may put files"),
        (another_owns_it, f"{SRV} belongs to user 1000, not to root"),
        (it_is_a_link, f"{SRV} is not a directory but a link or a file"),
        (it_is_missing, f"{SRV} is missing, and is not made by the agent: mkdir -p {SRV}"),
        (it_is_read_only, f"{POINT} is missing, and {SRV} is on a read-only filesystem"),
        (there_is_content, f"{POINT} is not empty"),
        (there_is_a_link, f"{POINT} is a link or a file"),
        (there_is_a_mount, f"tmpfs is mounted at {POINT}"),
    ],
)
def test_what_is_in_the_way_is_said_and_it_is_mounted_once_that_has_gone(
    fixed: Room, obstacle: Callable[[], Callable[[], object]], says: str
) -> None:
    end = obstacle()
    plug(fixed)
    fixed.agent.until_said(f"conflict: .*{says}")
    assert [line for line in at(POINT) if "/dev/dm-" in line] == []
    fixed.agent.forget()
    end()
    served(fixed)


def test_a_mount_is_adopted_by_the_same_rule(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    before = at(POINT)
    restart(fixed, AT)
    fixed.agent.until_said("adopting its mount")
    assert at(POINT) == before


def test_a_mount_is_moved_by_another_rule_after_a_crash(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    restart(fixed, f'mount.path = "{SRV}/{{partlabel}}"\n')
    served(fixed, SRV / "cartridge-01")
    assert not POINT.exists()
    restart(fixed, "")
    served(fixed, fixed.point())
    assert list(SRV.iterdir()) == []
    restart(fixed, AT)
    served(fixed)
    assert not fixed.point().exists()


@pytest.mark.parametrize("is_there", [True, False])
def test_a_mount_that_no_rule_asks_for_is_released_after_a_crash(
    fixed: Room, *, is_there: bool
) -> None:
    plug(fixed)
    served(fixed)
    fixed.agent.kill()
    if not is_there:
        fixed.medium.pull()
    fixed.configure('match.serial = "another"\n')
    fixed.agent.start()
    until_released()
    until(lambda: not POINT.exists())


def test_a_directory_that_was_only_made_is_removed_at_the_start(fixed: Room) -> None:
    fixed.agent.kill()
    POINT.mkdir()
    POINT.chmod(0o1500)
    (SRV / "own").mkdir(mode=0o500)
    fixed.agent.start()
    until(lambda: not POINT.exists())
    (SRV / "own").rmdir()


def test_a_pulled_medium_in_use_leaves_its_path_to_the_next(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    with process(hold_open, POINT):
        fixed.medium.pull()
        until(lambda: not POINT.exists())
        plug(fixed)
        served(fixed)


def test_a_mount_below_directories_that_others_may_change_now_is_released(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    restart(fixed, AT)
    fixed.agent.until_said("adopting its mount")
    SRV.chmod(0o777)
    fixed.agent.stop()
    assert not POINT.exists()
    until_released()
    SRV.chmod(0o755)


def test_a_directory_that_has_become_read_only_is_left_until_the_next_release(fixed: Room) -> None:
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(SRV))
    plug(fixed)
    served(fixed)
    run("mount", "-o", "remount,ro", str(SRV))
    fixed.agent.stop()
    until_released()
    assert POINT.is_dir()
    fixed.agent.start()
    served(fixed)
    run("mount", "-o", "remount,rw", str(SRV))
    fixed.medium.pull()
    until_released()
    until(lambda: not POINT.exists())
    run("umount", str(SRV))


def test_the_partition_above_is_unmounted_with_the_volume_in_it(fixed: Room) -> None:
    run("mount", "-t", "tmpfs", "-o", "mode=755", "tmpfs", str(SRV))
    plug(fixed)
    served(fixed)
    run("umount", "-R", str(SRV))  # as systemd at a stop of the partition's unit
    fixed.agent.until_said("unmounted by somebody else")
    until_released()


def test_a_volume_is_released_though_the_directory_above_was_renamed(fixed: Room) -> None:
    plug(fixed)
    served(fixed)
    SRV.rename(ROOM / "renamed")
    fixed.agent.stop()
    until_released()
    assert list((ROOM / "renamed").iterdir()) == []
    (ROOM / "renamed").rename(SRV)
