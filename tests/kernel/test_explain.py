"""What `explain` says of a device in the guest, and to whom it says that there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Rule
from caam_hotplug.daemon import explain
from caam_hotplug.errors import HotplugError
from fakes.contract import until
from kernel.agents import Room
from kernel.test_lost_events import udevd_hanging
from kernel.witness import run

ANY = Config(rule=(Rule(name="any", match=Match(partlabel="cartridge-*")),))


def said(device: str, config: Config) -> str:
    return "\n".join(explain.explain(device, config))


def test_a_device_is_told_with_its_facts_and_the_rule_that_matches_it(room: Room) -> None:
    with room.medium.disposable():
        told = said(room.medium.partition, ANY)
        assert f"{room.medium.partition}: partition on scsi" in told
        assert "  partlabel  'cartridge-01'" in told
        assert "rule 'any' matches it" in told
        assert "  mount point /run/media/cartridge-01 (nosuid,nodev,noexec)" in told
        by_link = "/dev/disk/by-partlabel/cartridge-01"
        assert said(by_link, ANY) == told


def test_a_device_of_which_udev_has_not_told_is_told_as_its_partition_table_has_it(
    room: Room,
) -> None:
    with udevd_hanging():
        room.medium.plug()
        until(lambda: room.medium.is_plugged and Path(room.medium.partition).exists())
        told = said(room.medium.partition, ANY)
        room.medium.pull()
    run("udevadm", "settle")
    assert "  partlabel  'cartridge-01'" in told
    assert "  udev has not reported it yet, and may report more" in told
    assert "rule 'any' matches it" in told


def test_a_device_that_no_rule_matches_is_told_why(room: Room) -> None:
    with room.medium.disposable():
        told = said(room.medium.partition, Config(rule=BUILT_IN))
        assert "no rule matches it; it is left untouched" in told
        assert "rule 'built-in': bus is scsi, not usb, mmc" in told


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/null", "it is no block device"),
        ("/no/such/device", "No such file or directory"),
        ("/etc/passwd", "it is no block device"),
    ],
)
def test_what_is_no_block_device_is_refused(path: str, words: str) -> None:
    with pytest.raises(HotplugError, match=f"look at {path}: {words}"):
        said(path, ANY)


def test_the_kernels_own_source_tells_the_same_label(room: Room) -> None:
    with room.medium.disposable():
        told = said(room.medium.partition, Config(source="kernel", rule=ANY.rule))
        assert "  partlabel  'cartridge-01'" in told
        assert Path(room.medium.partition).is_block_device()
