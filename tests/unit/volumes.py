"""Volumes for tests: one that is plain, and every one that an attacker could bring."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import strategies as st

from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume, VolumeId

STICK = Volume(
    id=VolumeId(7, 1),
    name="sdb1",
    number=DeviceNumber(8, 17),
    devtype=DevType.PARTITION,
    size=Sectors(204800),
    bus=Bus.USB,
    removable=True,
    read_only=False,
    partlabel="cartridge",
)
"""A labelled partition of 100 MiB on a USB stick."""


def stick(**changes: Any) -> Volume:
    """The stick with other facts."""
    return replace(STICK, **changes)


sequence_numbers = st.integers(min_value=0, max_value=2**64 - 1)
volume_ids = st.builds(VolumeId, sequence_numbers, st.integers(min_value=0, max_value=2**20))
claims = (
    st.none()
    | st.sampled_from(["cartridge", "a", "b.2", "_", "x" * 36, "x" * 37, "", ".", "..", "../etc"])
    | st.text(max_size=6)
)
"""What a medium may say of itself."""

volumes = st.builds(
    Volume,
    id=volume_ids,
    name=st.sampled_from(["sda", "sdb1", "mmcblk0p3"]),
    number=st.builds(DeviceNumber, st.integers(0, 4095), st.integers(0, 2**20 - 1)),
    devtype=st.sampled_from(DevType),
    size=st.integers(min_value=0, max_value=2**50).map(Sectors),
    bus=st.sampled_from(Bus),
    removable=st.booleans(),
    read_only=st.booleans(),
    partlabel=claims,
    partuuid=claims,
    label=claims,
    uuid=claims,
    serial=claims,
    vendor=claims,
    model=claims,
    path=claims,
    opted_out=st.booleans(),
)
