from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import gpt
from vm import media

MIB = 1 << 20
SIZE = 8 * MIB
DATA = UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")
MARKED = gpt.Identity("(not finished)", uuid4(), uuid4())
LABELLED = gpt.Identity("cartridge-01", DATA, uuid4())

PARTS = (  # of a table, in the order in which they are written: where they are, their length
    (SIZE - 33 * 512, 32 * 512),
    (SIZE - 512, 512),
    (2 * 512, 32 * 512),
    (512, 512),
    (0, 512),
)


class Disk:
    """An image, and what gpt.py reads off it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()
        os.truncate(path, SIZE)
        self.file = os.open(path, os.O_RDWR | os.O_DSYNC)

    def read(self) -> tuple[gpt.Entry, ...] | None:
        return gpt.read(self.file, str(self.path))

    def identities(self) -> list[gpt.Identity] | None:
        entries = self.read()
        return None if entries is None else [entry.identity for entry in entries]

    def make(self, identity: gpt.Identity = MARKED) -> gpt.Entry:
        return gpt.make(self.file, str(self.path), identity)

    def rename(self, identity: gpt.Identity = LABELLED) -> None:
        gpt.rename(self.file, str(self.path), 1, identity)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    yield made
    os.close(made.file)


def test_a_blank_disk_has_no_table(disk: Disk) -> None:
    assert disk.read() is None


def test_a_table_is_made_with_one_partition_on_whole_mebibytes(disk: Disk) -> None:
    made = disk.make()
    assert disk.read() == (made,)
    assert (made.identity, made.start, made.length) == (MARKED, 2048, 6 * 2048)


def test_a_table_made_by_others_is_read(tmp_path: Path) -> None:
    media.write_disk(tmp_path / "others.img", "cartridge-09", bytes(MIB))
    file = os.open(tmp_path / "others.img", os.O_RDONLY)
    (entry,) = gpt.read(file, "others") or ()
    os.close(file)
    assert (entry.identity.name, entry.identity.type) == ("cartridge-09", DATA)
    assert (entry.start, entry.length) == (2048, 2048)


def test_reading_a_table_leaves_every_byte_as_it_was(disk: Disk) -> None:
    disk.make()
    os.pwrite(disk.file, b"\xff", 600)  # the first header is damaged
    before = disk.path.read_bytes()
    assert disk.identities() == [MARKED]
    assert disk.path.read_bytes() == before


def test_to_rename_changes_names_and_nothing_of_the_place(disk: Disk) -> None:
    made = disk.make()
    disk.rename()
    assert disk.read() == (gpt.Entry(1, LABELLED, made.start, made.length),)


@pytest.mark.parametrize("written", range(len(PARTS) + 1))
def test_a_table_renamed_up_to_any_part_is_the_old_or_the_new_one_and_is_whole_after_another_try(
    disk: Disk, written: int
) -> None:
    disk.make()
    old = disk.path.read_bytes()
    disk.rename()
    new = disk.path.read_bytes()
    torn = bytearray(old)
    for start, length in PARTS[:written]:
        torn[start : start + length] = new[start : start + length]
    assert torn == new or written < 4
    disk.path.write_bytes(torn)
    assert disk.identities() == [LABELLED if written > 2 else MARKED]
    disk.rename()
    assert disk.path.read_bytes() == new


def test_signatures_of_what_was_there_are_gone(disk: Disk) -> None:
    # Swap space: version, last page, and a magic number at the end of the first page.
    os.pwrite(disk.file, struct.pack("<II", 1, 100), 1024)
    os.pwrite(disk.file, b"SWAPSPACE2", 4096 - 10)
    disk.make()
    assert os.pread(disk.file, 10, 4096 - 10) == bytes(10)


def test_of_two_partitions_the_one_that_is_meant_is_renamed(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    media.write_disk(path, "first", bytes(MIB))
    with path.open("r+b") as file:
        add_a_second(file.fileno(), path.stat().st_size)
        first, second = gpt.read(file.fileno(), str(path)) or ()
        gpt.rename(file.fileno(), str(path), second.number, LABELLED)
        assert gpt.read(file.fileno(), str(path)) == (first, replace(second, identity=LABELLED))


@pytest.mark.parametrize("number", [0, 2])
def test_a_partition_that_is_not_there_is_not_renamed(tmp_path: Path, number: int) -> None:
    path = tmp_path / "disk.img"
    media.write_disk(path, "first", bytes(MIB))
    before = path.read_bytes()
    with path.open("r+b") as file, pytest.raises(KernelError, match="it has none"):
        gpt.rename(file.fileno(), str(path), number, LABELLED)
    assert path.read_bytes() == before


def test_on_a_disk_without_a_table_nothing_is_renamed(disk: Disk) -> None:
    with pytest.raises(KernelError, match="it has none"):
        disk.rename()
    assert disk.path.read_bytes() == bytes(SIZE)


def add_a_second(file: int, size: int) -> None:
    """Add a copy of the first entry, over the last of its sectors, and shorten the first by it."""
    import binascii

    entries = bytearray(os.pread(file, 128 * 128, 1024))
    first, last = struct.unpack_from("<QQ", entries, 32)
    entries[128:256] = entries[:128]
    struct.pack_into("<16sQQ", entries, 128 + 16, uuid4().bytes_le, last, last)
    struct.pack_into("<QQ", entries, 32, first, last - 1)
    for header_at, entries_at in ((512, 1024), (size - 512, size - 33 * 512)):
        os.pwrite(file, entries, entries_at)
        header = bytearray(os.pread(file, 512, header_at))
        struct.pack_into("<I", header, 88, binascii.crc32(entries))
        struct.pack_into("<I", header, 16, 0)
        struct.pack_into("<I", header, 16, binascii.crc32(header[:92]))
        os.pwrite(file, header, header_at)


def test_a_disk_that_is_too_small_is_an_error_and_stays_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(bytes(16384))
    file = os.open(path, os.O_RDWR)
    with pytest.raises(KernelError):
        gpt.make(file, str(path), MARKED)
    os.close(file)
    assert path.read_bytes() == bytes(16384)
