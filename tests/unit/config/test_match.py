from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.config.match import Bytes, Match
from caam_hotplug.model import Bus, DevType, Sectors
from unit.volumes import stick


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("512", 512), ("1KiB", 2**10), ("64 MiB", 2**26), ("2GiB", 2**31), ("1TiB", 2**40)],
)
def test_a_size_is_read_with_its_unit(text: str, size: int) -> None:
    assert Bytes.from_text(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "64MB", "64 mib", "-1MiB", "1.5GiB", "٣MiB", "1_000", "1 M iB", "0x10"]
)
def test_a_size_of_another_form_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="expected a size such as 512MiB or 64GiB, found"):
        Bytes.from_text(text)


WHOLE = stick(
    partuuid="0f1c3a52-01",
    parttype="0x83",
    label="clear",
    uuid="6ba7b810",
    serial="4C530001",
    vendor="SanDisk",
    model="Ultra",
    path="platform-30b50000.mmc",
)


@pytest.mark.parametrize(
    "match",
    [
        Match(),
        Match(partlabel="cart*"),
        Match(partlabel=("other", "cartridg[a-f]")),
        Match(partuuid="0f1c3a52-??"),
        Match(parttype="0x83"),
        Match(label="clear"),
        Match(uuid="6ba*"),
        Match(serial="4C53*"),
        Match(vendor="SanDisk"),
        Match(model="U*"),
        Match(path="platform-*.mmc"),
        Match(bus=Bus.USB),
        Match(bus=(Bus.MMC, Bus.USB)),
        Match(removable=True),
        Match(devtype=DevType.PARTITION),
        Match(min_size=Bytes(204800 * 512)),
        Match(max_size=Bytes(204800 * 512)),
    ],
)
def test_a_condition_that_the_volume_meets_does_not_fail(match: Match) -> None:
    assert list(match.failures(WHOLE)) == []


@pytest.mark.parametrize(
    ("match", "failure"),
    [
        (Match(partlabel="Cartridge"), "partlabel is 'cartridge', not 'Cartridge'"),
        (Match(partlabel="cart"), "partlabel is 'cartridge', not 'cart'"),
        (Match(partlabel=("a", "b*")), "partlabel is 'cartridge', not 'a', 'b*'"),
        (Match(serial="?*"), "serial is not there, so it is not '?*'"),
        (Match(uuid="*"), "uuid is not there, so it is not '*'"),
        (Match(bus=Bus.MMC), "bus is usb, not mmc"),
        (Match(bus=(Bus.MMC, Bus.NVME)), "bus is usb, not mmc, nvme"),
        (Match(removable=False), "removable is true, not false"),
        (Match(devtype=DevType.DISK), "devtype is partition, not disk"),
        (
            Match(min_size=Bytes(104857601)),
            "min_size is 104857601 bytes, the volume has 104857600",
        ),
        (
            Match(max_size=Bytes(104857599)),
            "max_size is 104857599 bytes, the volume has 104857600",
        ),
    ],
)
def test_a_condition_that_the_volume_does_not_meet_is_described(match: Match, failure: str) -> None:
    assert list(match.failures(stick())) == [failure]


def test_a_rule_matches_only_partitions_by_default() -> None:
    disk = stick(devtype=DevType.DISK)
    assert list(Match().failures(disk)) == ["devtype is disk, not partition"]
    assert list(Match(devtype=DevType.DISK).failures(disk)) == []


def test_every_failed_condition_is_named_in_the_order_of_the_keys() -> None:
    match = Match(max_size=Bytes(1), bus=Bus.MMC, partlabel="x")
    assert [failure.split()[0] for failure in match.failures(stick())] == [
        "partlabel",
        "bus",
        "max_size",
    ]


def test_a_hostile_label_is_shown_escaped() -> None:
    volume = stick(partlabel="a\n\x1b[2J")
    assert next(Match(partlabel="x").failures(volume)) == ("partlabel is 'a\\n\\x1b[2J', not 'x'")


@given(st.integers(0, 2**40), st.integers(0, 2**50), st.integers(0, 2**50))
def test_sizes_are_limits_that_are_themselves_allowed(sectors: int, least: int, most: int) -> None:
    volume = stick(size=Sectors(sectors))
    match = Match(min_size=Bytes(least), max_size=Bytes(most))
    assert (not list(match.failures(volume))) == (least <= sectors * 512 <= most)
