from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.model import DeviceNumber, Mapping, SecretBytes, VolumeId
from unit.volumes import stick, volume_ids


@given(volume_ids)
def test_a_volumes_id_comes_back_from_its_text(volume: VolumeId) -> None:
    assert VolumeId.from_text(str(volume)) == volume


@pytest.mark.parametrize(
    "text",
    ["", "7", "-", "7-", "-1", "7-1-2", "07-1", "7-01", "+7-1", " 7-1", "7-1\n", "7_0-1", "٧-1"],
)
def test_a_text_of_another_form_names_no_volume(text: str) -> None:
    assert VolumeId.from_text(text) is None


@given(st.text(alphabet="0123456789-+ _", max_size=12))
def test_a_text_that_names_a_volume_is_that_volumes_only_spelling(text: str) -> None:
    volume = VolumeId.from_text(text)
    assert volume is None or str(volume) == text


def test_volumes_are_ordered_by_insertion_then_by_partition() -> None:
    assert sorted([VolumeId(10, 0), VolumeId(9, 2), VolumeId(9, 1)]) == [
        VolumeId(9, 1),
        VolumeId(9, 2),
        VolumeId(10, 0),
    ]


@given(st.integers(0, 4095), st.integers(0, 2**20 - 1))
def test_a_device_number_comes_back_from_its_text(major: int, minor: int) -> None:
    number = DeviceNumber(major, minor)
    assert DeviceNumber.from_text(str(number)) == number


def test_a_device_number_is_read_as_sysfs_ends_it() -> None:
    assert DeviceNumber.from_text("8:17\n") == DeviceNumber(8, 17)


@pytest.mark.parametrize(
    "text", ["", "8", "8:", ":17", "8:17:1", "eight:17", "/dev/sdb1", "-8:17", "8:1_7", "٨:17"]
)
def test_a_device_number_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        DeviceNumber.from_text(text)


def test_a_volume_is_shown_with_its_label_its_kernel_name_and_its_id() -> None:
    assert str(stick()) == "'cartridge' (sdb1, 7-1)"
    assert str(stick(partlabel=None)) == "(sdb1, 7-1)"


def test_a_hostile_label_reaches_the_journal_escaped() -> None:
    assert str(stick(partlabel="a\n\x1b[31mü")) == "'a\\n\\x1b[31m\\xfc' (sdb1, 7-1)"


def test_the_nodes_are_those_that_devtmpfs_keeps() -> None:
    mapping = Mapping("caam-cartridge-7-1", "CAAM-HOTPLUG-7-1", DeviceNumber(253, 4), (), 0)
    assert (stick().node, mapping.node) == ("/dev/sdb1", "/dev/dm-4")


def test_secret_bytes_are_overwritten_in_place_on_exit() -> None:
    buffer = bytearray(b"red key")
    with SecretBytes(buffer) as secret:
        assert secret.buffer is buffer
        assert bytes(secret.buffer) == b"red key"
    assert buffer == bytes(7)


def test_secret_bytes_are_overwritten_when_their_user_fails() -> None:
    buffer = bytearray(b"red key")
    with pytest.raises(KeyError), SecretBytes(buffer):
        raise KeyError
    assert buffer == bytes(7)


def test_secret_bytes_show_their_length_only() -> None:
    secret = SecretBytes(bytearray(b"red key"))
    assert (repr(secret), str(secret), len(secret)) == (
        "<7 secret bytes>",
        "<7 secret bytes>",
        7,
    )
