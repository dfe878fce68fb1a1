"""Entries are found in tables that others wrote, and no table makes the search endless."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import struct
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import blkid, partition_table
from caam_hotplug.kernel.partial_copy import PartialCopy
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.model import Sectors
from vm import media

MIB = 1 << 20
SECTORS = 2048
"""Of the partition, which begins at sector 2048."""
HERE = Place(1, Sectors(2048), Sectors(SECTORS))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with a GPT of one partition."""
    path = tmp_path / "disk"
    media.write_disk(path, "cartridge-01", bytes(SECTORS * 512))
    return path


def entry(image: Path, place: Place = HERE, block: int = 512) -> blkid.Entry | None:
    file = os.open(image, os.O_RDONLY)
    try:
        with closing(PartialCopy(file, str(image), block)) as copy:
            return partition_table.entry_of(copy, place)
    finally:
        os.close(file)


def label(image: Path, place: Place = HERE) -> str | None:
    found = entry(image, place)
    return None if found is None else found.name


def write(image: Path, position: int, content: bytes) -> None:
    with image.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_an_entry_is_found_by_its_place(image: Path) -> None:
    assert label(image) == "cartridge-01"


@pytest.mark.parametrize(
    ("place", "is_it"),
    [
        (Place(2, Sectors(2048), Sectors(SECTORS)), True),
        (Place(1, Sectors(2048), Sectors(SECTORS - 8)), True),
        (Place(2, Sectors(2048), Sectors(SECTORS - 8)), False),
        (Place(1, Sectors(2048), Sectors(SECTORS + 8)), False),
        (Place(1, Sectors(2056), Sectors(SECTORS)), False),
    ],
    ids=["renumbered", "grown", "another, grown", "shrunk", "moved"],
)
def test_an_entry_of_another_place_is_none(image: Path, place: Place, *, is_it: bool) -> None:
    assert (entry(image, place) is not None) is is_it


@pytest.mark.parametrize("damage", [(512, bytes(512)), (1024, b"\xff" * 16), (512 + 16, b"1234")])
def test_the_copy_of_a_damaged_table_counts(image: Path, damage: tuple[int, bytes]) -> None:
    write(image, *damage)
    assert label(image) == "cartridge-01"


def test_a_table_that_is_damaged_twice_is_none(image: Path) -> None:
    write(image, 512, bytes(512))
    write(image, image.stat().st_size - 512, bytes(512))
    assert entry(image) is None


def test_what_was_not_copied_reads_as_zeros(image: Path) -> None:
    file = os.open(image, os.O_RDONLY)
    write(image, MIB, b"\xaa" * 8192)
    with closing(PartialCopy(file, "image", 512)) as copy:
        copy.add(MIB + 512, 512)
        assert copy.read(MIB, 8192) == b"\xaa" * 4096 + bytes(4096)
        copy.add(copy.size - 512, 1024)
        assert copy.read(copy.size - 512, 1024).startswith(b"EFI PART")
        copy.add(copy.size, 512)
        assert copy.read(copy.size, 512) == copy.read(-1, 512) == b""
        assert os.fstat(copy.file).st_size == copy.size
    os.close(file)


def test_a_device_that_cannot_be_read_past_the_cache_is_read_through_it(
    image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(file: int, buffers: list[mmap.mmap], position: int) -> int:
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(file, buffers, position)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", refusing)
    file = os.open(image, os.O_RDONLY | os.O_DIRECT)
    with closing(PartialCopy(file, "/dev/sdx", 512)) as copy:
        found = partition_table.entry_of(copy, HERE)
    os.close(file)
    assert found is not None
    assert found.name == "cartridge-01"
    said = "/dev/sdx cannot be read past the kernel's cache; reading that"
    assert caplog.messages == [said]


def test_a_device_that_ends_before_its_size_is_an_error(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    file = os.open(image, os.O_RDONLY)
    with (
        closing(PartialCopy(file, "/dev/sdx", 512)) as copy,
        pytest.raises(KernelError, match="read /dev/sdx: Input/output error"),
    ):
        partition_table.entry_of(copy, HERE)
    os.close(file)


def make_unreadable(monkeypatch: pytest.MonkeyPatch, *sectors: int) -> None:
    """Have all reads fail that begin before one of these sectors and end after it."""

    def read(file: int, buffers: list[mmap.mmap], position: int) -> int:
        end = position + sum(map(len, buffers))
        if any(position < (sector + 1) * 512 and sector * 512 < end for sector in sectors):
            raise OSError(errno.EIO, "Input/output error")
        return preadv(file, buffers, position)

    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", read)


@pytest.mark.parametrize("sector", [1, 2, 8, 33])
def test_the_copy_of_an_unreadable_table_counts(
    image: Path, monkeypatch: pytest.MonkeyPatch, sector: int
) -> None:
    make_unreadable(monkeypatch, sector)
    assert label(image) == "cartridge-01"


def test_a_table_that_is_unreadable_twice_is_an_error(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unreadable(monkeypatch, 1, image.stat().st_size // 512 - 1)
    with pytest.raises(KernelError, match=r"read .*: Input/output error"):
        entry(image)


def test_an_entry_of_an_mbr_is_found_though_what_follows_is_unreadable(
    logical: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_unreadable(monkeypatch, 1, 8192)
    assert entry(logical, Place(1, Sectors(2048), Sectors(2048))) is not None


def mbr(*entries: tuple[int, int, int], identifier: int = 0) -> bytes:
    """Return a sector with these entries: type, first block, blocks."""
    table = b"".join(struct.pack("<4xB3xII", *each) for each in entries).ljust(64, b"\0")
    return bytes(440) + struct.pack("<I2x", identifier) + table + b"\x55\xaa"


@pytest.fixture
def logical(tmp_path: Path) -> Path:
    """An image with an MBR of a primary partition and two logical ones."""
    path = tmp_path / "disk"
    path.touch()
    os.truncate(path, 16 * MIB)
    write(path, 0, mbr((0x83, 2048, 2048), (0x05, 8192, 16384), identifier=0xDEADBEEF))
    write(path, 8192 * 512, mbr((0x83, 2048, 2048), (0x05, 8192, 8192)))
    write(path, 16384 * 512, mbr((0x8E, 2048, 4096)))
    return path


@pytest.mark.parametrize(
    ("place", "uuid", "kind"),
    [
        (Place(1, Sectors(2048), Sectors(2048)), "deadbeef-01", "0x83"),
        (Place(5, Sectors(10240), Sectors(2048)), "deadbeef-05", "0x83"),
        (Place(6, Sectors(18432), Sectors(4096)), "deadbeef-06", "0x8e"),
    ],
)
def test_an_entry_of_an_mbr_is_found(logical: Path, place: Place, uuid: str, kind: str) -> None:
    found = entry(logical, place)
    assert found == blkid.Entry(place.number, place.start, place.size, None, uuid, kind)


def test_a_chain_that_leads_back_to_itself_ends(logical: Path) -> None:
    write(logical, 16384 * 512, mbr((0x83, 2048, 4096), (0x05, 8192, 8192)))
    assert entry(logical, Place(1, Sectors(2048), Sectors(2048))) is not None


def test_a_chain_that_leads_out_of_the_disk_ends(logical: Path) -> None:
    write(logical, 16384 * 512, mbr((0x83, 2048, 4096), (0x05, 0xFFFFFFFF, 1)))
    assert entry(logical, Place(5, Sectors(10240), Sectors(2048))) is not None


def huge(header: bytearray, _rng: random.Random) -> None:
    struct.pack_into("<QII", header, 72, 2, 0xFFFFFFFF, 0xFFFFFFFF)


def beyond(header: bytearray, _rng: random.Random) -> None:
    struct.pack_into("<QII", header, 72, 1 << 62, 128, 128)


def noise(header: bytearray, rng: random.Random) -> None:
    header[8:] = rng.randbytes(len(header) - 8)


@pytest.mark.parametrize("change", [huge, beyond, noise])
def test_a_hostile_header_is_no_table(
    image: Path, change: Callable[[bytearray, random.Random], None]
) -> None:
    for seed in range(20):
        header = bytearray(image.read_bytes()[512:1024])
        change(header, random.Random(seed))
        write(image, 512, bytes(header))
        write(image, image.stat().st_size - 512, bytes(header))
        assert entry(image) is None


@pytest.mark.parametrize("size", [0, 100, 512, 1000, 4096, 20000])
@pytest.mark.parametrize("block", [512, 4096])
def test_a_disk_that_is_too_small_has_no_table(tmp_path: Path, size: int, block: int) -> None:
    small = tmp_path / "small"
    small.write_bytes((mbr((0xEE, 1, 0xFFFFFFFF), (0x05, 1, 1)) + b"EFI PART" * 2500)[:size])
    assert entry(small, block=block) is None


def test_noise_is_neither_a_table_nor_a_header(tmp_path: Path) -> None:
    noisy = tmp_path / "noise"
    for seed in range(50):
        noisy.write_bytes(random.Random(seed).randbytes(MIB // 4))
        assert entry(noisy) is None
        file = os.open(noisy, os.O_RDONLY)
        assert blkid.superblock(file, "noise", is_disk=False) == blkid.Superblock()
        os.close(file)
