"""The agent measured beside the others; what is measured is not asserted."""

from __future__ import annotations

from typing import Final

from bench import figures, systems
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
"""What holds when nothing is left."""


async def test_a_cycle_of_every_system_is_measured_and_nothing_is_left(
    guest: Guest, agent: InstalledAgent
) -> None:
    await bench.prepare(guest)
    assert await bench.measured(guest, "--cycles", "1") == 0
    report = await bench.reported(guest)
    assert list(report["systems"]) == list(systems.SYSTEMS)
    for name, system in report["systems"].items():
        (cycle,) = system["cycles"]
        assert cycle["udev_add_to_mounted"] > 0
        assert cycle["own_cpu"] > 0
        assert cycle["left"] == (["directory"] if name == "Y" else [])
        assert name in ("S", "Y") or cycle["rss_kib"] >= cycle["pss_kib"] > 0
    assert len(report["goals"]) == len(figures.GOALS)
    assert await agent.leftovers() == []
    for condition in LEFT:
        await guest.until(condition)
    await bench.put_back(guest)
