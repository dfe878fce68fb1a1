"""A medium that was pulled while its journal had changes, and is write-protected now."""

from __future__ import annotations

import fcntl
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
UNREAD: Final = "read-only, without what its journal has"


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


def media(kind: str, where: Path) -> tuple[Path, Path]:
    """Make a medium; return a copy as it was while it was mounted, and one that was unmounted."""
    made, dirty, clean = (where / name for name in ("made", "dirty", "clean"))
    made.touch()
    os.truncate(made, (SIZE_MIB.get(kind, 64) + 2) << 20)
    run("sfdisk", "-q", str(made), stdin=f'label: gpt\nstart=2048, name="{LABEL}"\n'.encode())
    with (
        plugged(made, read_only=False) as device,
        locked(device),
        mapped(f"{device}p1") as node,
    ):
        run(*MAKERS[kind], node)
        with mounted(kind, node):
            written("settled", SETTLED)
        with mounted(kind, node):
            written("before", b"")  # f2fs writes a checkpoint for the first file after a mount
            run("sync", "-f", "/mnt")
            written("recent", RECENT)
            shutil.copyfile(made, dirty)
        shutil.copyfile(made, clean)
    made.unlink()
    return dirty, clean


@contextmanager
def locked(disk: str) -> Iterator[None]:
    """Keep udevd from reading the table anew after a writer's close; partitions go meanwhile.

    Source: systemd's BLOCK_DEVICE_LOCKING.md.
    """
    with Path(disk).open("rb") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield


@contextmanager
def mounted(kind: str, node: str) -> Iterator[None]:
    run("mount", "-t", kind, node, "/mnt")
    try:
        yield
    finally:
        run("umount", "/mnt")


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


@contextmanager
def served(room: Room, medium: Path, words: str, *, read_only: bool = True) -> Iterator[Path]:
    """The medium is mounted with these words, and is not changed; yield its mount point."""
    before = digest(medium)
    room.agent.start()
    with plugged(medium, read_only=read_only):
        room.agent.until_said(f"{LABEL}.*: mounted: at .*, {words}$")
        yield room.mount_root / LABEL
        room.agent.stop()
    assert not read_only or digest(medium) == before


@pytest.mark.parametrize(
    "kind", ["ext4", "btrfs", *(pytest.param(k, marks=pytest.mark.soak) for k in ("xfs", "f2fs"))]
)
def test_an_unclean_journal_of_a_write_protected_medium_is_left_and_that_is_said(
    room: Room, kind: str
) -> None:
    with folder() as where:
        dirty, clean = media(kind, where)
        with served(room, dirty, UNREAD) as point:
            room.agent.until_said_ever("it is write-protected, so it is mounted without the chang")
            assert (point / "settled").read_bytes() == SETTLED
        with served(room, clean, "read-only") as point:
            assert (point / "recent").read_bytes() == RECENT


def test_a_write_protected_fat_that_was_pulled_is_mounted_as_it_is(room: Room) -> None:
    with folder() as where:
        dirty, _ = media("vfat", where)
        with served(room, dirty, "read-only") as point:
            assert (point / "recent").read_bytes() == RECENT


def test_options_that_need_the_journal_are_left_out_and_an_adopted_mount_is_described_too(
    room: Room,
) -> None:
    options = '"commit=7", "data=journal", "journal_checksum", "errors=continue"'
    room.configure(f"mount.filesystem_options = {{ ext4 = [{options}] }}")
    with folder() as where:
        dirty, _ = media("ext4", where)
        with served(room, dirty, UNREAD):
            room.agent.kill()
            room.agent.begin()
            room.agent.until_said(f"{LABEL}.*: mounted: at .*, {UNREAD}$")


def test_a_rule_for_reading_only_has_the_journal_replayed_where_the_medium_allows_it(
    room: Room,
) -> None:
    room.configure("mount.read_only = true")
    with folder() as where:
        dirty, _ = media("ext4", where)
        with served(room, dirty, "read-only", read_only=False) as point:
            assert (point / "recent").read_bytes() == RECENT
