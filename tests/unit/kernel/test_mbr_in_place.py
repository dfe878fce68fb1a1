"""A partition's type is changed in an MBR, and not a byte else."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from caam_hotplug.errors import UnsupportedVolumeError
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.model import Sectors
from unit.kernel.disk_images import Gpt, mbr, on_disk, read

PLACE = Place(2, Sectors(4000), Sectors(1000))


def entry(first: int, count: int, kind: int = 0x83, status: int = 0) -> bytes:
    return struct.pack("<B3sB3sII", status, b"abc", kind, b"def", first, count)


TWO = [entry(100, 1000), entry(4000, 1000, 0xDA)]


def disk(entries: list[bytes], number: int = 0x1234ABCD) -> bytes:
    return mbr(entries, number) + os.urandom((4 << 20) - 512)


def test_the_type_is_changed_and_every_other_byte_is_as_before(tmp_path: Path) -> None:
    before = disk(TWO)
    with on_disk(tmp_path / "disk", before) as blocks:
        table = read(blocks)
        found = table.entry(PLACE)
        assert (table.disk_id, table.kind) == ("1234abcd", "dos")
        assert (found.type, found.uuid, found.boots) == ("0xda", "1234abcd-02", "")
        table.write(blocks, 2, "0x83", "")
        assert read(blocks).entry(PLACE).type == "0x83"
    after = (tmp_path / "disk").read_bytes()
    differ = [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]
    assert differ == [446 + 16 + 4]


def test_numbers_are_of_the_disks_own_blocks(tmp_path: Path) -> None:
    with on_disk(tmp_path / "disk", disk(TWO)) as blocks:
        found = read(blocks, 4096).entry(Place(2, Sectors(32000), Sectors(8000)))
        assert found.uuid == "1234abcd-02"


REFUSED = {
    "logical": (TWO, Place(5, Sectors(4000), Sectors(1000)), "partition 5 is a logical one"),
    "extended": (
        [TWO[0], entry(4000, 1000, 0x0F)],
        Place(2, Sectors(4000), Sectors(2)),
        "partition 2 is an extended one",
    ),
    "over the table": (
        [entry(100_000, 1000), entry(0, 4096, 0xDA)],
        Place(2, Sectors(0), Sectors(4096)),
        "partition 2 reaches into the table itself",
    ),
    "elsewhere": (TWO, Place(2, Sectors(4001), Sectors(1000)), "and the table does not"),
    "not there": (TWO, Place(3, Sectors(4000), Sectors(1000)), "and the table does not"),
    "overlapping": ([entry(100, 3901), TWO[1]], PLACE, "partitions 2 and 1 overlap"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_partition_whose_entry_cannot_be_changed_alone_is_refused(
    tmp_path: Path, why: str
) -> None:
    entries, place, words = REFUSED[why]
    with (
        on_disk(tmp_path / "disk", disk(entries)) as blocks,
        pytest.raises(UnsupportedVolumeError, match=words),
    ):
        read(blocks).entry(place)


@pytest.mark.parametrize("kind", [0x05, 0x0F, 0x85, 0x63, 0x81, 0xA5, 0xA6, 0xA9, 0xB7, 0xBF])
def test_a_primary_partition_that_has_others_in_it_is_refused(tmp_path: Path, kind: int) -> None:
    with (
        on_disk(tmp_path / "disk", disk([TWO[0], entry(4000, 1000, kind)])) as blocks,
        pytest.raises(UnsupportedVolumeError, match="which has others in it"),
    ):
        read(blocks).entry(PLACE)


def test_a_table_that_another_program_has_changed_since_is_not_written(tmp_path: Path) -> None:
    with on_disk(tmp_path / "disk", disk(TWO)) as blocks:
        table = read(blocks)
        blocks.write(0, mbr([entry(100, 2000), TWO[1]]))
        before = (tmp_path / "disk").read_bytes()
        with pytest.raises(UnsupportedVolumeError, match="another program changes it"):
            table.write(blocks, 2, "0x83", "")
    assert (tmp_path / "disk").read_bytes() == before


def test_a_disk_without_an_identifier_is_refused(tmp_path: Path) -> None:
    with (
        on_disk(tmp_path / "disk", disk(TWO, 0)) as blocks,
        pytest.raises(UnsupportedVolumeError, match="the disk has no identifier"),
    ):
        read(blocks).entry(PLACE)


@pytest.mark.parametrize(("kind", "status"), [(0xEF, 0), (0xEA, 0), (0x0C, 0x80)])
def test_an_entry_says_that_the_system_needs_the_partition_at_boot(
    tmp_path: Path, kind: int, status: int
) -> None:
    with on_disk(tmp_path / "disk", disk([TWO[0], entry(4000, 1000, kind, status)])) as blocks:
        assert read(blocks).entry(PLACE).boots


@pytest.mark.parametrize("start", [bytes(512), mbr([]), bytes(510) + b"\x55\xaa"])
def test_a_disk_without_a_table_is_refused(tmp_path: Path, start: bytes) -> None:
    with (
        on_disk(tmp_path / "disk", start + bytes((4 << 20) - 512)) as blocks,
        pytest.raises(UnsupportedVolumeError, match="it has neither a GPT nor an MBR"),
    ):
        read(blocks)


def test_an_old_gpt_that_no_mbr_protects_does_not_count(tmp_path: Path) -> None:
    image = Gpt().image()
    image[:512] = mbr(TWO)
    with on_disk(tmp_path / "disk", image) as blocks:
        assert read(blocks).kind == "dos"
