"""The partition that a user names by its label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import open_volume, sysfs, udev
from caam_hotplug.model import Appeared, Volume
from caam_hotplug.provisioning.volume_lookup import find_partition
from unit.volumes import stick


def test_a_partition_is_found_by_its_label_though_udev_does_not_find_its_entry(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    volume = stick(partlabel="cartridge-01")

    class Devices:
        def __init__(self, _source: str) -> None:
            pass

        def present(self) -> Iterator[Appeared]:
            yield Appeared(replace(volume, partlabel=None, partuuid=None, parttype=None))

        def close(self) -> None:
            pass

    def identify(found: Volume) -> Volume:
        return replace(found, partlabel=volume.partlabel)

    monkeypatch.setattr(udev, "Devices", Devices)
    monkeypatch.setattr(sysfs, "there", lambda: iter(()))
    monkeypatch.setattr(open_volume, "identify", identify)
    found = find_partition("cartridge-01", Config(blob_directory=tmp_path))
    assert found.partlabel == "cartridge-01"


UUID = "1234abcd-02"


@pytest.mark.parametrize(
    "text", ["cartridge-01", "PARTLABEL=cartridge-01", UUID, UUID.upper(), f"PARTUUID={UUID}"]
)
def test_a_partition_is_found_by_label_or_identifier(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    volume = stick(partlabel="cartridge-01", partuuid=UUID)
    monkeypatch.setattr(sysfs, "there", lambda: iter([volume]))
    monkeypatch.setattr(udev, "Devices", NoDevices)
    assert find_partition(text, Config(blob_directory=tmp_path)) == volume


@pytest.mark.parametrize(
    "text", [f"PARTLABEL={UUID}", "PARTUUID=cartridge-01", "LABEL=cartridge-01", "", "PARTUUID="]
)
def test_a_tag_says_what_the_text_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str
) -> None:
    volumes = [stick(partlabel="cartridge-01", partuuid=UUID), stick(partlabel=None, partuuid=None)]
    monkeypatch.setattr(sysfs, "there", lambda: iter(volumes))
    monkeypatch.setattr(udev, "Devices", NoDevices)
    with pytest.raises(HotplugError, match=r"^provision .*: no partition has this label or "):
        find_partition(text, Config(blob_directory=tmp_path), "provision")


class NoDevices:
    def __init__(self, _source: str) -> None:
        pass

    def present(self) -> Iterator[Appeared]:
        return iter(())

    def close(self) -> None:
        pass
