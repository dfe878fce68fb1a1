"""Output of `explain` for a device in the guest, and its refusal of other paths."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Rule
from caam_hotplug.daemon import explain
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import sysfs
from caam_hotplug.model import Entry, State
from fakes.contract import until
from kernel.agents import Room
from kernel.test_lost_events import udevd_hanging
from kernel.witness import run

ANY = Config(rule=(Rule(name="any", match=Match(partlabel="cartridge-*")),))


def explained(device: str, config: Config) -> str:
    return "\n".join(explain.explain(device, config))


def test_explain_shows_the_facts_of_a_device_and_the_rule_that_matches(room: Room) -> None:
    with room.medium.disposable():
        text = explained(room.medium.partition, ANY)
        assert f"{room.medium.partition}: partition on scsi" in text
        assert "  partlabel  'cartridge-01'" in text
        assert "rule 'any' matches it" in text
        assert "  mount point /run/media/cartridge-01 (nosuid,nodev,noexec)" in text
        by_link = "/dev/disk/by-partlabel/cartridge-01"
        assert explained(by_link, ANY) == text


def test_explain_reads_the_partition_table_of_a_device_that_udev_has_not_reported(
    room: Room,
) -> None:
    with udevd_hanging():
        room.medium.plug()
        until(lambda: room.medium.is_plugged and Path(room.medium.partition).exists())
        text = explained(room.medium.partition, ANY)
        room.medium.pull()
    run("udevadm", "settle")
    assert "  partlabel  'cartridge-01'" in text
    assert "  udev has not reported it yet, and may report more" in text
    assert "rule 'any' matches it" in text


def test_explain_says_why_no_rule_matches_a_device(room: Room) -> None:
    with room.medium.disposable():
        text = explained(room.medium.partition, Config(rule=BUILT_IN))
        assert "no rule matches it; it is left untouched" in text
        assert "rule 'built-in': bus is scsi, not usb, mmc" in text


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/dev/null", "it is no block device"),
        ("/no/such/device", "No such file or directory"),
        ("/etc/passwd", "it is no block device"),
    ],
)
def test_explain_refuses_a_path_that_is_no_block_device(path: str, words: str) -> None:
    with pytest.raises(HotplugError, match=f"look at {path}: {words}"):
        explained(path, ANY)


def test_the_kernels_own_events_have_the_same_label(room: Room) -> None:
    with room.medium.disposable():
        text = explained(room.medium.partition, Config(source="kernel", rule=ANY.rule))
        assert "  partlabel  'cartridge-01'" in text
        assert Path(room.medium.partition).is_block_device()


def test_explain_says_which_rule_holds_a_medium_whatever_the_files_say_now(room: Room) -> None:
    with room.medium.disposable():
        name = Path(room.medium.partition).name
        volume = next(volume for volume in sysfs.there() if volume.name == name)
        known = replace(volume, partlabel="cartridge-01", identified=True, awaits_udev=True)
        entry = Entry(known, State.MOUNTED, "at /run/media/cartridge-01", rule="earlier")
        entry = replace(entry, observed_at=time.mktime((2026, 11, 30, 8, 26, 7, 0, 0, -1)))
        same, others = (
            "\n".join(explain.explain(room.medium.partition, config, [entry]))
            for config in (ANY, Config(rule=BUILT_IN))
        )
    held = (
        "it is mounted: at /run/media/cartridge-01\n"
        "  as of 2026-11-30 08:26:07, when the kernel was last looked at\n"
        "  rule 'earlier' is in force for it\n"
    )
    assert "  udev has not reported it yet, and may report more" in same
    assert f"{held}after a reload of the configuration files:\nrule 'any' matches it" in same
    assert f"{held}after a reload of the configuration files:\nno rule matches it" in others
