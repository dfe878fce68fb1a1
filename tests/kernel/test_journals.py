"""A medium that was pulled while its journal had changes, and is write-protected now."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from kernel.agents import Room
from kernel.cartridges import KEY
from kernel.witness import detach, run

LABEL: Final = "cartridge-03"
MAKERS: Final = {
    "ext4": ("mkfs.ext4", "-q"),
    "xfs": ("mkfs.xfs", "-q", "--unsupported"),
    "btrfs": ("mkfs.btrfs", "-q"),
    "f2fs": ("mkfs.f2fs", "-q"),
    "vfat": ("mkfs.vfat",),
}
SIZE_MIB: Final = {"btrfs": 128}
SETTLED: Final = b"it was there long before"
RECENT: Final = b"only the journal has it"
UNREAD: Final = "read-only, without what its journal has$"


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as made:
        yield Path(made)


@contextmanager
def plugged(file: Path, *, read_only: bool) -> Iterator[str]:
    """Plug the medium in the file; yield its device."""
    more = ("-r",) if read_only else ()
    device = run("losetup", "-f", "-P", *more, "--show", str(file)).strip()
    try:
        yield device
    finally:
        detach(device)


def pulled(kind: str, where: Path, *, dirty: bool = True) -> Path:
    """Make a medium, write two files to it, and return a copy of it as it was at that moment."""
    made, copy = where / "made", where / "copy"
    made.touch()
    os.truncate(made, (SIZE_MIB.get(kind, 64) + 2) << 20)
    run("sfdisk", "-q", str(made), stdin=f'label: gpt\nstart=2048, name="{LABEL}"\n'.encode())
    with plugged(made, read_only=False) as device, mapped(f"{device}p1") as node:
        run(*MAKERS[kind], node)
        run("mount", "-t", kind, node, "/mnt")
        try:
            written("settled", SETTLED)
            run("sync", "-f", "/mnt")
            written("recent", RECENT)
            if dirty:
                shutil.copyfile(made, copy)
        finally:
            run("umount", "/mnt")
        if not dirty:
            shutil.copyfile(made, copy)
    made.unlink()
    return copy


@contextmanager
def mapped(partition: str) -> Iterator[str]:
    sectors = run("blockdev", "--getsz", partition).strip()
    table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {partition} 0"
    run("dmsetup", "create", "making", "--table", table)
    try:
        yield "/dev/mapper/making"
    finally:
        run("dmsetup", "remove", "--retry", "making")


def written(name: str, content: bytes) -> None:
    """The file has the content, and the medium knows it."""
    with Path("/mnt", name).open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file)


def digest(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "f2fs"])
def test_an_unclean_journal_of_a_write_protected_medium_is_left_and_that_is_said(
    room: Room, kind: str
) -> None:
    with folder() as where:
        medium = pulled(kind, where)
        before = digest(medium)
        room.agent.start()
        with plugged(medium, read_only=True):
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, {UNREAD}")
            room.agent.until_said_ever("it is write-protected, so it is mounted without the chang")
            assert (room.mount_root / LABEL / "settled").read_bytes() == SETTLED
            room.agent.stop()
        assert digest(medium) == before


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs", "f2fs"])
def test_a_clean_journal_of_a_write_protected_medium_is_no_obstacle(room: Room, kind: str) -> None:
    with folder() as where:
        medium = pulled(kind, where, dirty=False)
        room.agent.start()
        with plugged(medium, read_only=True):
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, read-only$")
            assert (room.mount_root / LABEL / "recent").read_bytes() == RECENT
            room.agent.stop()


def test_a_write_protected_fat_that_was_pulled_is_mounted_as_it_is(room: Room) -> None:
    with folder() as where:
        medium = pulled("vfat", where)
        room.agent.start()
        with plugged(medium, read_only=True):
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, read-only$")
            assert (room.mount_root / LABEL / "recent").read_bytes() == RECENT
            room.agent.stop()


def test_options_of_the_rule_that_need_the_journal_are_left_out_without_it(room: Room) -> None:
    options = '"commit=7", "data=journal", "journal_checksum", "errors=continue"'
    room.configure(f"mount.filesystem_options = {{ ext4 = [{options}] }}")
    with folder() as where:
        medium = pulled("ext4", where)
        room.agent.start()
        with plugged(medium, read_only=True):
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, {UNREAD}")
            room.agent.stop()


def test_an_agent_that_adopts_such_a_mount_says_so_too(room: Room) -> None:
    with folder() as where:
        medium = pulled("ext4", where)
        room.agent.start()
        with plugged(medium, read_only=True):
            room.agent.until_said(f"{LABEL}.*: mounted: at ")
            room.agent.kill()
            room.agent.begin()
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, {UNREAD}")
            room.agent.stop()


def test_a_rule_for_reading_only_has_the_journal_replayed_where_the_medium_allows_it(
    room: Room,
) -> None:
    room.configure("mount.read_only = true")
    with folder() as where:
        medium = pulled("ext4", where)
        room.agent.start()
        with plugged(medium, read_only=False):
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, read-only$")
            assert (room.mount_root / LABEL / "recent").read_bytes() == RECENT
            room.agent.stop()
