"""A partition's entry is changed in both copies of a GPT, and not a byte else."""

from __future__ import annotations

import os
import struct
import zlib
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.errors import KernelError, UnsupportedVolumeError
from caam_hotplug.kernel import blkid, gpt, gpt_in_place, kept_checksum
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.model import Sectors
from unit.kernel.disk_images import DISK, ESP, LINUX, RECORDER, SYSTEM, Gpt, Part, on_disk, read

SHAPES = {
    "usual": Gpt(),
    "4096-byte blocks": Gpt(block=4096),
    "larger entries": Gpt(each=256),
    "entries larger than a block": Gpt(each=1024, count=64),
    "more entries": Gpt({1: SYSTEM, 200: RECORDER}, count=256),
    "few entries": Gpt(count=2),
    "few entries in 4096-byte blocks": Gpt(block=4096, count=3),
    "an image on a larger disk": Gpt(end=4096),
}


def place_of(shape: Gpt, part: Part = RECORDER) -> Place:
    unit = shape.block // 512
    (number,) = (number for number, each in shape.parts.items() if each is part)
    size = Sectors((part.last + 1 - part.first) * unit)
    return Place(number, Sectors(part.first * unit), size)


def changes(before: bytes, after: bytes) -> list[int]:
    return [at for at, (old, new) in enumerate(zip(before, after, strict=True)) if old != new]


def allowed(shape: Gpt, number: int) -> set[int]:
    """Type, GUID and name of the entry, in both copies."""
    starts = [at * shape.block + (number - 1) * shape.each for at in shape.copies.values()]
    return {start + n for start in starts for n in (*range(32), *range(56, 128))}


@pytest.mark.parametrize("shape", SHAPES)
def test_type_and_name_are_changed_in_both_copies_and_every_other_byte_is_as_before(
    tmp_path: Path, shape: str
) -> None:
    made = SHAPES[shape]
    image, place = made.image(), place_of(made)
    with on_disk(tmp_path / "disk", image) as blocks:
        table = read(blocks, made.block)
        assert table.disk_id == str(DISK)
        entry = table.entry(place)
        assert (entry.name, entry.type, entry.boots) == ("recorder", LINUX, "")
        table.write(blocks, place.number, names.UNFINISHED_TYPE, "recorder")
        marked = (tmp_path / "disk").read_bytes()
        found = read(blocks, made.block).entry(place)
        assert (found.name, found.type) == ("recorder", names.UNFINISHED_TYPE)
        read(blocks, made.block).write(blocks, place.number, LINUX, "archive")
        found = read(blocks, made.block).entry(place)
        assert (found.name, found.type, found.uuid) == ("archive", LINUX, str(RECORDER.uuid))
    after = (tmp_path / "disk").read_bytes()
    for state in (marked, after):
        changed = changes(image, state)
        assert set(changed) <= allowed(made, place.number)
        assert min(changed) // made.block != max(changed) // made.block


@pytest.mark.parametrize("shape", ["usual", "4096-byte blocks", "an image on a larger disk"])
def test_other_programs_read_the_name_without_the_bytes_after_it(
    tmp_path: Path, shape: str
) -> None:
    made = SHAPES[shape]
    with on_disk(tmp_path / "disk", made.image()) as blocks:
        read(blocks, made.block).write(blocks, 2, LINUX, "x" * gpt_in_place.NAME_MAX_LENGTH)
    file = os.open(tmp_path / "disk", os.O_RDONLY)
    try:
        seen = blkid.entries(file, "disk", sector_bytes=made.block)
        assert [each.name for each in seen] == ["system", "x" * gpt_in_place.NAME_MAX_LENGTH]
        assert seen[1].uuid == str(RECORDER.uuid)
        if made.block == 512:
            fdisks = gpt.read(file, "disk")
            assert fdisks is not None
            assert fdisks[1].identity.name == "x" * gpt_in_place.NAME_MAX_LENGTH
    finally:
        os.close(file)


class CutBlocks(Blocks):
    """The power is cut before one of the writes."""

    def __init__(self, file: int, writes: int) -> None:
        super().__init__(file, "disk")
        self.writes = writes

    def write(self, position: int, content: bytes) -> None:
        if not self.writes:
            raise KernelError("write to", "disk", 5)
        self.writes -= 1
        super().write(position, content)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("writes", [0, 1])
def test_cut_before_any_write_both_copies_are_whole_and_the_next_run_finishes(
    tmp_path: Path, shape: str, writes: int
) -> None:
    made = SHAPES[shape]
    place = place_of(made)
    with on_disk(tmp_path / "disk", made.image()) as blocks:
        table = read(blocks, made.block)
        file = os.open(tmp_path / "disk", os.O_RDWR)
        with pytest.raises(KernelError):
            table.write(CutBlocks(file, writes), place.number, names.UNFINISHED_TYPE, "x")
        os.close(file)
        between = read(blocks, made.block)
        assert between.entry(place).type == LINUX
        between.write(blocks, place.number, names.UNFINISHED_TYPE, "x")
        found = read(blocks, made.block)
        assert isinstance(found, gpt_in_place.Table)
        assert found.first.entries == found.second.entries
        assert found.entry(place).type == names.UNFINISHED_TYPE


def damaged(shape: Gpt, at: int, patch: bytes, *, sealed: bool = False) -> bytearray:
    """The image with these bytes at a place of the disk, under a new header's checksum."""
    image = shape.image()
    image[at : at + len(patch)] = patch
    if sealed:
        header = at // 512 * 512
        image[header + 16 : header + 20] = bytes(4)
        crc = zlib.crc32(image[header : header + 92])
        image[header + 16 : header + 20] = struct.pack("<I", crc)
    return image


LAST = Gpt().blocks - 1
DAMAGES = {
    "no first header": (512, bytes(8), "copy at block 1 is damaged: it does not begin as a GPT"),
    "first header": (512 + 72, b"\x09", "copy at block 1 is damaged: its header does not have"),
    "first entries": (1024 + 40, b"\x07", "copy at block 1 is damaged: its entries do not have"),
    "no second header": (LAST * 512, bytes(8), f"copy at block {LAST} is damaged: it does not"),
    "second entries": ((LAST - 20) * 512, b"\x07", f"copy at block {LAST} is damaged: its entries"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_refused_with_its_place_and_what_is_wrong_with_it(
    tmp_path: Path, damage: str
) -> None:
    at, patch, words = DAMAGES[damage]
    with (
        on_disk(tmp_path / "disk", damaged(Gpt(), at, patch)) as blocks,
        pytest.raises(UnsupportedVolumeError) as refused,
    ):
        read(blocks)
    assert str(refused.value).startswith("change the partition table of /dev/sda: its ")
    assert words in str(refused.value)


LIES = {
    "length of the header": (12, struct.pack("<I", 513), "its header has 513 bytes"),
    "place of the header": (24, struct.pack("<Q", 7), "says that it is at block 7"),
    "place of the other": (32, struct.pack("<Q", 1 << 60), f"copy at block {1 << 60} is damaged"),
    "place of the entries": (72, struct.pack("<Q", 1 << 63), "its entries would be at block"),
    "entries over the header": (72, struct.pack("<Q", 1), "its entries would be at block 1"),
    "number of entries": (80, struct.pack("<I", 1 << 31), "it has 2147483648 entries"),
    "no entries": (80, struct.pack("<I", 0), "it has 0 entries of 128 bytes"),
    "odd size of an entry": (84, struct.pack("<I", 200), "it has 128 entries of 200 bytes"),
    "small entries": (84, struct.pack("<I", 64), "it has 128 entries of 64 bytes"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_header_that_lies_is_refused(tmp_path: Path, lie: str) -> None:
    offset, patch, words = LIES[lie]
    image = damaged(Gpt(), 512 + offset, patch, sealed=True)
    with (
        on_disk(tmp_path / "disk", image) as blocks,
        pytest.raises(UnsupportedVolumeError, match=words),
    ):
        read(blocks)


def test_copies_of_different_tables_are_refused(tmp_path: Path) -> None:
    image = damaged(Gpt(), LAST * 512 + 56, b"another disk's  ", sealed=True)
    with (
        on_disk(tmp_path / "disk", image) as blocks,
        pytest.raises(UnsupportedVolumeError, match="are of different tables"),
    ):
        read(blocks)


def test_copies_that_differ_in_another_partition_are_refused(tmp_path: Path) -> None:
    with on_disk(tmp_path / "disk", Gpt().image()) as blocks:
        table = read(blocks)
        file = os.open(tmp_path / "disk", os.O_RDWR)
        with pytest.raises(KernelError):
            table.write(CutBlocks(file, 1), 1, names.UNFINISHED_TYPE, "x")
        os.close(file)
        with pytest.raises(UnsupportedVolumeError, match="its two copies differ in other"):
            read(blocks).entry(place_of(Gpt()))


FALSE = {
    "another start": (Place(2, Sectors(401), Sectors(199)), "the kernel has partition 2 at sector"),
    "another size": (Place(2, Sectors(400), Sectors(199)), "and the table does not"),
    "another number": (Place(3, Sectors(400), Sectors(200)), "the kernel has partition 3"),
    "no number": (Place(0, Sectors(400), Sectors(200)), "the kernel has partition 0"),
}


@pytest.mark.parametrize("false", FALSE)
def test_a_partition_that_the_table_has_elsewhere_is_refused(tmp_path: Path, false: str) -> None:
    place, words = FALSE[false]
    with (
        on_disk(tmp_path / "disk", Gpt().image()) as blocks,
        pytest.raises(UnsupportedVolumeError, match=words),
    ):
        read(blocks).entry(place)


class ChangedBlocks(Blocks):
    """Another program writes a table of its own before one of our writes has begun, or after."""

    def __init__(self, file: int, image: bytes, writes: int) -> None:
        super().__init__(file, "disk")
        self.image, self.writes = image, writes

    def read(self, position: int, length: int) -> bytes:
        if not self.writes:
            super().write(0, self.image)
        return super().read(position, length)

    def write(self, position: int, content: bytes) -> None:
        self.writes -= 1
        super().write(position, content)


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_what_another_program_changes_at_the_same_time_is_not_torn(
    tmp_path: Path, writes: int
) -> None:
    """Most programs that write tables take no lock."""
    theirs = bytes(Gpt({1: Part("new", 300, 399), 2: RECORDER}).image())
    with on_disk(tmp_path / "disk", Gpt().image()) as blocks:
        table = read(blocks)
        file = os.open(tmp_path / "disk", os.O_RDWR)
        with pytest.raises(UnsupportedVolumeError, match="another program changes it"):
            table.write(ChangedBlocks(file, theirs, writes), 2, LINUX, "archive")
        os.close(file)
        read(blocks).entry(place_of(Gpt()))
    assert (tmp_path / "disk").read_bytes() == theirs


REACHING = {
    "a neighbour": (Part("system", 300, 400), RECORDER, "partitions 2 and 1 overlap"),
    "the first entries": (SYSTEM, Part("recorder", 20, 60), "reaches into the table itself"),
    "the second header": (SYSTEM, Part("recorder", 8000, LAST), "reaches into the table itself"),
}


@pytest.mark.parametrize("what", REACHING)
def test_a_partition_that_reaches_into_what_is_not_its_own_is_refused(
    tmp_path: Path, what: str
) -> None:
    system, recorder, words = REACHING[what]
    shape = Gpt({1: system, 2: recorder})
    with (
        on_disk(tmp_path / "disk", shape.image()) as blocks,
        pytest.raises(UnsupportedVolumeError, match=words),
    ):
        read(blocks).entry(place_of(shape, recorder))


def test_a_second_copy_that_lies_in_a_neighbour_is_not_written(tmp_path: Path) -> None:
    """The image ended there, and the neighbour was grown over that place since."""
    shape = Gpt({1: Part("system", 1000, 8000), 2: RECORDER}, end=4096)
    with (
        on_disk(tmp_path / "disk", shape.image()) as blocks,
        pytest.raises(UnsupportedVolumeError, match="partition 1 reaches into the table itself"),
    ):
        read(blocks).entry(place_of(shape))


def test_a_name_that_leaves_no_room_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    shape = Gpt({2: Part("x" * 33, 400, 599)})
    image = shape.image()
    with on_disk(tmp_path / "disk", image) as blocks:
        table = read(blocks)
        with pytest.raises(UnsupportedVolumeError, match="has more than 32 characters"):
            table.write(blocks, 2, LINUX, "y" * 33)
        with pytest.raises(UnsupportedVolumeError, match="has more than 32 characters"):
            table.require_changeable(2, "y" * 33)
        table.require_changeable(2, "y" * 32)
    assert (tmp_path / "disk").read_bytes() == image


BOOTS = {
    "an EFI system partition": Part("x", 400, 599, ESP),
    "the board needs it": Part("x", 400, 599, attributes=1),
    "boots from it": Part("x", 400, 599, attributes=4),
}


@pytest.mark.parametrize("why", BOOTS)
def test_an_entry_says_that_the_system_needs_the_partition_at_boot(
    tmp_path: Path, why: str
) -> None:
    shape = Gpt({2: BOOTS[why]})
    with on_disk(tmp_path / "disk", shape.image()) as blocks:
        assert why in read(blocks).entry(place_of(shape, BOOTS[why])).boots


@settings(max_examples=50)
@given(st.binary(min_size=512, max_size=512), st.binary(max_size=92), st.integers(0, 91))
def test_whatever_a_header_says_it_is_refused_or_read_and_never_an_error_of_the_program(
    tmp_path_factory: pytest.TempPathFactory, entries: bytes, patch: bytes, offset: int
) -> None:
    image = damaged(Gpt(), 512 + offset, patch[: 92 - offset], sealed=True)
    image[1024:1536] = entries
    with (
        on_disk(tmp_path_factory.mktemp("fuzz") / "disk", image) as blocks,
        suppress(UnsupportedVolumeError),
    ):
        read(blocks).entry(place_of(Gpt()))


@given(st.binary(min_size=8, max_size=300), st.integers(0), st.integers(0, 2**32 - 1))
def test_four_bytes_give_any_content_any_checksum(content: bytes, at: int, crc: int) -> None:
    changed, place = bytearray(content), 2 + at % (len(content) - 5)
    kept_checksum.keep(changed, place, crc)
    assert zlib.crc32(changed) == crc
    before, after = slice(place - 2), slice(place + 4, None)
    assert (changed[before], changed[after]) == (content[before], content[after])
    assert changed[place - 2 : place + 4].decode("utf-16-le")
