from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.errors import UnsupportedVolumeError
from caam_hotplug.formats.crypt_table import Crypt, CryptTarget, crypt_target
from caam_hotplug.model import DeviceNumber, KeyReference, Sectors, VolumeId
from unit.volumes import stick

LINE = "0 204800 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:7-1 0 8:17 0"
TARGET = CryptTarget(
    length=Sectors(204800),
    cipher="capi:tk(cbc(aes))-plain",
    key_bytes=36,
    key_description="logon:caam-hotplug:7-1",
    iv_offset=0,
    device=DeviceNumber(8, 17),
    offset=0,
    options=frozenset(),
)


def test_the_line_of_the_built_in_rule_is_that_of_nxps_procedure() -> None:
    assert crypt_target(stick(), Crypt(), KeyReference("logon", 36)).to_line() == LINE


def test_a_line_without_options_is_read() -> None:
    assert CryptTarget.from_line(LINE) == TARGET


def test_a_line_with_options_is_read() -> None:
    assert CryptTarget.from_line(f"{LINE} 2 sector_size:4096 allow_discards") == replace(
        TARGET, options=frozenset({"allow_discards", "sector_size:4096"})
    )


@pytest.mark.parametrize(
    "line",
    [
        "",
        "0 204800 error",
        "0 204800 linear 8:17 0",
        LINE.replace("crypt", "verity"),
        LINE.removesuffix(" 0"),
        LINE.replace("0 204800", "8 204800"),
        LINE.replace(":36:logon:caam-hotplug:7-1", "00112233445566778899aabbccddeeff"),
        LINE.replace(":36:logon", ":x:logon"),
        LINE.replace("204800", "many"),
        LINE.replace("8:17", "/dev/sdb1"),
        LINE.replace("8:17", "8"),
        LINE.replace(":36:logon:caam-hotplug:7-1", ":36"),
        LINE.replace("204800", "-204800"),
        LINE.replace("204800", "204_800"),
        LINE.replace(" 0 8:17", " +0 8:17"),
        f"{LINE} 0",
        f"{LINE} 1 allow_discards same_cpu_crypt",
        f"{LINE} 2 allow_discards allow_discards",
        f"{LINE} 2 allow_discards same_cpu_crypt same_cpu_crypt",
    ],
)
def test_another_line_is_no_target_of_the_agent(line: str) -> None:
    assert CryptTarget.from_line(line) is None


@given(st.lists(st.sampled_from([*LINE.split(" "), "1", "a"]), max_size=12).map(" ".join))
def test_no_line_raises(line: str) -> None:
    target = CryptTarget.from_line(line)
    assert target is None or target.to_line().startswith("0 ")


def test_a_key_of_another_size_maps_the_same_bytes_alike() -> None:
    assert replace(TARGET, key_bytes=44).does_the_same(TARGET)


@pytest.mark.parametrize(
    "change",
    [
        {"length": Sectors(1)},
        {"cipher": "capi:tk(cbc(aes))-plain64"},
        {"key_description": "logon:caam-hotplug:8-1"},
        {"iv_offset": 1},
        {"device": DeviceNumber(8, 18)},
        {"offset": 1},
        {"options": frozenset({"allow_discards"})},
    ],
)
def test_a_difference_in_anything_else_is_a_difference(change: dict[str, Any]) -> None:
    assert not replace(TARGET, **change).does_the_same(TARGET)


def test_the_targets_parts_come_from_rule_volume_and_key() -> None:
    crypt = Crypt(
        cipher="capi:tk(cbc(aes))-plain64",
        sector_size=4096,
        offset=2048,
        iv_offset=8,
        flags=("allow_discards", "iv_large_sectors"),
    )
    volume = stick(id=VolumeId(12, 3), number=DeviceNumber(179, 3), size=Sectors(10240))
    assert crypt_target(volume, crypt, KeyReference("logon", 52)).to_line() == (
        "0 8192 crypt capi:tk(cbc(aes))-plain64 :52:logon:caam-hotplug:12-3 8 179:3 2048 "
        "3 allow_discards iv_large_sectors sector_size:4096"
    )


def test_sectors_that_do_not_fill_a_last_encrypted_one_stay_outside() -> None:
    volume = stick(size=Sectors(8 * 5 + 7))
    assert crypt_target(volume, Crypt(sector_size=4096), KeyReference("logon", 36)).length == 40


@pytest.mark.parametrize(
    ("size", "sector_size", "offset"), [(100, 512, 100), (100, 512, 101), (7, 4096, 0), (0, 512, 0)]
)
def test_a_volume_without_room_behind_the_offset_is_refused(
    size: int, sector_size: Literal[512, 4096], offset: int
) -> None:
    crypt = Crypt(sector_size=sector_size, offset=offset)
    with pytest.raises(UnsupportedVolumeError) as caught:
        crypt_target(stick(size=Sectors(size)), crypt, KeyReference("logon", 36))
    assert str(caught.value) == f"map sdb1: it has {size} sectors, the rule's offset is {offset}"


LIMIT = 2**32


def test_a_plain_iv_may_count_to_its_last_number() -> None:
    assert (
        crypt_target(stick(size=Sectors(LIMIT)), Crypt(), KeyReference("logon", 36)).length == LIMIT
    )
    shifted = Crypt(iv_offset=1)
    assert (
        crypt_target(stick(size=Sectors(LIMIT - 1)), shifted, KeyReference("logon", 36)).length
        == LIMIT - 1
    )


@pytest.mark.parametrize(
    ("size", "crypt"),
    [
        (LIMIT + 1, Crypt()),
        (LIMIT, Crypt(iv_offset=1)),
        (LIMIT + 8, Crypt(sector_size=4096)),
        (LIMIT * 8 + 8, Crypt(sector_size=4096, flags=("iv_large_sectors",))),
    ],
)
def test_a_volume_on_which_a_plain_iv_would_repeat_is_refused(size: int, crypt: Crypt) -> None:
    with pytest.raises(UnsupportedVolumeError, match=r"repeats its IV after 2\^32 .* use plain64$"):
        crypt_target(stick(size=Sectors(size)), crypt, KeyReference("logon", 36))


@pytest.mark.parametrize(
    "crypt",
    [
        Crypt(cipher="capi:tk(cbc(aes))-plain64"),
        Crypt(cipher="capi:tk(cbc(aes))-essiv:sha256"),
        Crypt(sector_size=4096, flags=("iv_large_sectors",)),
    ],
)
def test_an_iv_that_does_not_repeat_has_no_such_limit(crypt: Crypt) -> None:
    assert (
        crypt_target(stick(size=Sectors(LIMIT + 8)), crypt, KeyReference("logon", 36)).length
        == LIMIT + 8
    )


@given(
    st.integers(0, 2**31),
    st.integers(0, 2**31),
    st.sampled_from([512, 1024, 2048, 4096]),
)
def test_a_target_never_reaches_beyond_its_volume(
    size: int, offset: int, sector_size: Literal[512, 1024, 2048, 4096]
) -> None:
    crypt = Crypt(offset=offset, sector_size=sector_size)
    try:
        target = crypt_target(stick(size=Sectors(size)), crypt, KeyReference("logon", 36))
    except UnsupportedVolumeError:
        assert size - offset < sector_size // 512
    else:
        assert 0 < target.length <= size - offset
        assert target.length % (sector_size // 512) == 0
