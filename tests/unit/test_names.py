from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.model import VolumeId
from unit.volumes import volume_ids

ALLOWED = set(string.ascii_letters + string.digits + "._-")


@given(volume_ids)
def test_a_mappings_uuid_leads_back_to_its_volume(volume: VolumeId) -> None:
    assert names.volume_of_dm_uuid(names.dm_uuid(volume)) == volume


@pytest.mark.parametrize(
    "uuid",
    [
        "",
        "7-1",
        "LVM-7-1",
        "CRYPT-PLAIN-7-1",
        "caam-hotplug-7-1",
        "CAAM-HOTPLUG-",
        "CAAM-HOTPLUG-7",
        "CAAM-HOTPLUG-07-1",
        "CAAM-HOTPLUG-7-1 ",
        "XCAAM-HOTPLUG-7-1",
    ],
)
def test_another_uuid_is_not_the_agents(uuid: str) -> None:
    assert names.volume_of_dm_uuid(uuid) is None


def test_two_insertions_of_one_label_have_different_mappings_and_keys() -> None:
    first, second = VolumeId(7, 1), VolumeId(8, 1)
    assert names.dm_name(first, "cartridge") == "caam-cartridge-7-1"
    assert names.dm_name(second, "cartridge") == "caam-cartridge-8-1"
    assert names.key_description(first) == "caam-hotplug:7-1"
    assert names.key_description(second) == "caam-hotplug:8-1"


@pytest.mark.parametrize(
    "name", ["a", "_", "0", "cartridge", "A.b_c-9", "a..b", "a-", "a.", "x" * 36]
)
def test_a_plain_name_may_become_part_of_a_path(name: str) -> None:
    assert names.why_unsafe(name) is None


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("", "it is empty"),
        (".", "it starts with '.'"),
        ("..", "it starts with '.'"),
        (".hidden", "it starts with '.'"),
        ("-rf", "it starts with '-'"),
        ("x" * 37, "it is longer than 36 characters"),
        ("a/b", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("a\0b", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("a b", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("a\n", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("ü", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("٧", "it has characters other than A-Z a-z 0-9 . _ -"),
        ("a\u202eb", "it has characters other than A-Z a-z 0-9 . _ -"),
    ],
)
def test_an_unsafe_name_is_refused_with_the_reason(name: str, why: str) -> None:
    assert names.why_unsafe(name) == why


@given(st.text(max_size=40) | st.text(alphabet="a/.-\0\n", max_size=6))
def test_a_name_that_could_lead_elsewhere_is_unsafe(name: str) -> None:
    is_safe = names.why_unsafe(name) is None
    expected = 0 < len(name) <= 36 and set(name) <= ALLOWED and name[0] not in ".-"
    assert is_safe == expected
