"""The agent measured beside other systems; the figures are not asserted."""

from __future__ import annotations

from typing import Final

import pytest

from vm import bench
from vm.guest import Guest
from vm.installed import InstalledAgent

LEFT: Final = (
    "test \"$(dmsetup ls)\" = 'No devices found'",
    "! grep -w logon /proc/keys",
    "! test -e /sys/module/scsi_debug",
    "! systemctl list-units --all --plain --no-legend 'bench*' | grep .",
    "! ls -d /run/systemd/system/*bench* /run/systemd/system/*/bench.conf",
    "! ls /etc/crypttab /run/bench* /run/udev/rules.d/*bench* /usr/bin/udiskie",
)
"""Shell condition that holds when nothing is left."""


@pytest.mark.parametrize(
    ("names", "goals"),
    [
        pytest.param(["agent", "L"], 5, id="two"),
        pytest.param(["agent", "L", "S", "Y", "U"], 6, id="all", marks=pytest.mark.soak),
    ],
)
async def test_a_cycle_of_each_kind_of_system_is_measured_and_nothing_is_left(
    guest: Guest, agent: InstalledAgent, names: list[str], goals: int
) -> None:
    await bench.prepare(guest)
    once = "--cycles 1 --warm-ups 0"
    assert await bench.measured(guest, "--systems", ",".join(names), *once.split()) == 0
    report = await bench.reported(guest)
    assert list(report["systems"]) == names
    for name, (cycle,) in report["samples"]["cycles"].items():
        assert cycle["kernel_add_to_mounted"] > 0
        assert cycle["own_cpu"] > 0
        assert name == "U" or cycle["left"] == (["directory"] if name == "Y" else [])
        assert name in ("S", "Y") or cycle["rss_kib"] >= cycle["pss_kib"] > 0
    assert len(report["goals"]) == goals
    await nothing_is_left(guest, agent)


@pytest.mark.soak
async def test_storms_scaling_starts_and_idling_are_measured_and_nothing_is_left(
    guest: Guest, agent: InstalledAgent
) -> None:
    await bench.prepare(guest)
    few = "--systems agent --cycles 1 --warm-ups 0 --storms 1 --sticks 2 --disks 2 --minute-s 1"
    what = "storm,scaling,start,idle"
    assert await bench.measured(guest, "--what", what, *few.split()) == 0
    samples = (await bench.reported(guest))["samples"]
    assert {name: list(systems) for name, systems in samples.items()} == {
        "storm": ["agent"],
        "scaling": ["agent"],
        "start": ["agent", "bare"],
        "idle": ["agent"],
    }
    for name in ("storm", "scaling", "start"):
        for (sample,) in samples[name].values():
            assert all(value > 0 for value in sample.values())
    await nothing_is_left(guest, agent)


async def nothing_is_left(guest: Guest, agent: InstalledAgent) -> None:
    """Check that nothing is left of the measurement and its programs."""
    assert await agent.leftovers() == []
    for condition in LEFT:
        await guest.until(condition)
    await bench.put_back(guest)
