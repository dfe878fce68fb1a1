"""What an agent remembers of a volume is read by later runs as it was written, or not at all."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, State, Volume, VolumeId

VOLUME = Volume(
    VolumeId(9, 1), "sdb1", DeviceNumber(8, 17), DevType.PARTITION, Sectors(32768), Bus.USB,
    removable=True, read_only=False, partlabel="cartridge-01", path="pci-0000:00",
)  # fmt: skip


@given(
    label=st.none() | st.text(),
    state=st.sampled_from([None, State.LOCKED, State.EJECTED]),
    is_held=st.booleans(),
    lost=st.text(),
    released=st.text(),
)
def test_a_mark_reads_as_it_was_written(
    label: str | None, state: State | None, is_held: bool, lost: str, released: str
) -> None:
    mark = Mark(replace(VOLUME, partlabel=label), state, is_held, lost, released=released)
    assert Mark.from_text(mark.to_text()) == mark


@given(text=st.text() | st.recursive(st.none() | st.text(), st.lists).map(json.dumps))
def test_another_text_is_no_mark(text: str) -> None:
    assert Mark.from_text(text) is None


@pytest.mark.parametrize("fact", ["id", "number", "devtype", "bus", "size"])
@pytest.mark.parametrize("wrong", [None, "x", ["x"]])
def test_a_mark_with_another_kind_of_fact_is_none(fact: str, wrong: object) -> None:
    whole = json.loads(Mark(VOLUME).to_text())
    whole["volume"][fact] = wrong
    assert Mark.from_text(json.dumps(whole)) is None


def test_a_mark_without_a_name_is_none() -> None:
    whole = json.loads(Mark(VOLUME).to_text())
    del whole["volume"]["name"]
    assert Mark.from_text(json.dumps(whole)) is None


def test_facts_that_another_version_knows_do_no_harm() -> None:
    written = json.loads(Mark(VOLUME).to_text())
    assert written["volume"].keys() == {each.name for each in fields(Volume)}
    written["volume"]["colour"] = "red"
    assert Mark.from_text(json.dumps(written)) == Mark(VOLUME)


def test_a_mark_of_a_version_that_did_not_remember_what_it_was_released_for_is_read() -> None:
    written = json.loads(Mark(VOLUME, State.LOCKED).to_text())
    del written["released"], written["unmounted"]
    assert Mark.from_text(json.dumps(written)) == Mark(VOLUME, State.LOCKED)
