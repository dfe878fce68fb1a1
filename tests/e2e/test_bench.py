"""The agent measured beside the limit; what is measured is not asserted."""

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
)
"""What holds when nothing is left."""


async def test_a_cycle_of_the_agent_and_of_the_limit_is_measured_and_nothing_is_left(
    guest: Guest, agent: InstalledAgent
) -> None:
    await bench.prepare(guest)
    assert await bench.measured(guest, "--systems", "agent,L,S", "--cycles", "1") == 0
    report = await bench.reported(guest)
    assert list(report["systems"]) == ["agent", "L", "S"]
    for name, system in report["systems"].items():
        (cycle,) = system["cycles"]
        assert all(cycle[column.key] > 0 for column in figures.TIMES)
        assert cycle["own_cpu"] > 0
        assert cycle["rss_kib"] >= cycle["pss_kib"] > 0 or name == "S"
    assert len(report["goals"]) == len(figures.GOALS)
    assert await agent.leftovers() == []
    for condition in LEFT:
        await guest.until(condition)
    await guest.run("rm", "-r", str(systems.PROGRAMS))
