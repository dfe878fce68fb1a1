"""Any table of a mapping is a target or none, and any DM-UUID names a volume or none."""

from __future__ import annotations

from typing import Final

from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.formats.crypt_table import CryptTarget
from caam_hotplug.model import DeviceNumber, Sectors, VolumeId
from fuzz.inputs import mutated, tries
from unit.volumes import volume_ids

LINES: Final = [
    b"0 204800 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:7-1 0 8:17 0",
    b"0 8192 crypt capi:tk(cbc(aes))-plain64 :52:logon:caam-hotplug:12-3 8 179:3 2048 "
    b"3 allow_discards iv_large_sectors sector_size:4096",
    b"0 204800 error",
    b"0 204800 linear 8:17 0",
    b"0 1 crypt aes-xts-plain64 00112233445566778899aabbccddeeff 0 8:17 0",
]


def parse(line: str) -> CryptTarget | None:
    """Parse the line, and check that its target has the same line; None for another line."""
    target = CryptTarget.from_line(line)
    if target is not None:
        assert CryptTarget.from_line(target.to_line()) == target
        assert target.does_the_same(target)
        for number in (target.length, target.key_bytes, target.iv_offset, target.offset):
            assert number >= 0
        # No word is lost: only the order of the options may differ.
        assert sorted(target.to_line().split(" ")) == sorted(line.split(" "))
    return target


@tries("dm table: any text", line=st.text(max_size=120))
def test_any_text_is_a_target_or_none(line: str) -> None:
    parse(line)


@tries("dm table: a line of the kernel's, damaged", line=mutated(st.sampled_from(LINES)))
def test_a_damaged_line_is_a_target_or_none(line: bytes) -> None:
    parse(line.decode(errors="replace"))


fields = st.lists(
    st.sampled_from(
        ["0", "1", "00", "204800", "-1", "+1", "1_0", "٧", "1" * 5000, "crypt", "error", "8:17",
         "8:1_7", ":36:logon:x", "::", ":1:", "aes-xts-plain64", "", "2", "allow_discards",
         "sector_size:4096"]
    ),
    max_size=6,
)  # fmt: skip


@tries("dm table: fields missing, doubled and wrong", tail=fields, head=fields)
def test_fields_in_any_order_are_a_target_or_none(head: list[str], tail: list[str]) -> None:
    parse(" ".join(head + tail))
    parse(" ".join(["0", "204800", "crypt", "aes-xts-plain64", ":36:logon:x", *tail]))
    parse(" ".join([*LINES[0].decode().split(" "), *tail]))


words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters=" "), min_size=1)
numbers = st.integers(0, 2**63)
targets = st.builds(
    CryptTarget,
    length=numbers.map(Sectors),
    cipher=words,
    key_bytes=numbers,
    key_description=words,
    iv_offset=numbers,
    device=st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    offset=numbers,
    options=st.frozensets(words, max_size=4),
)


@tries("dm table: any target, and back", target=targets)
def test_every_target_comes_back_from_its_line(target: CryptTarget) -> None:
    assert parse(target.to_line()) == target


@tries("dm table: options in another order", target=targets)
def test_the_order_in_which_the_kernel_lists_options_does_not_matter(target: CryptTarget) -> None:
    fields = target.to_line().split(" ")
    assert parse(" ".join(fields[:9] + fields[:8:-1])) == target


uuids = (
    st.text(max_size=40)
    | st.text("0123456789-+_ ٧", max_size=30).map(lambda rest: f"{names.DM_UUID_PREFIX}{rest}")
    | volume_ids.map(names.dm_uuid)
)


@tries("dm uuid: any text", uuid=uuids)
def test_a_uuid_names_one_volume_and_only_its_own_spelling_does(uuid: str) -> None:
    volume = names.volume_of_dm_uuid(uuid)
    assert volume is None or names.dm_uuid(volume) == uuid


@tries("dm uuid: any volume, and back", volume=volume_ids)
def test_every_volume_comes_back_from_its_uuid(volume: VolumeId) -> None:
    assert names.volume_of_dm_uuid(names.dm_uuid(volume)) == volume
