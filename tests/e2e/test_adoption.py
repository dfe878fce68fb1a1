"""A medium is released by request whatever became of its partition and mapping meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.support import ANY_BUS, POINT
from e2e.test_bus import until_state
from vm.guest import Guest
from vm.installed import InstalledAgent


async def plugged(guest: Guest, agent: InstalledAgent, medium: Path) -> None:
    """Mount a medium, and kill the agent."""
    await agent.configure(ANY_BUS)
    await agent.start()
    await guest.plug_scsi(medium)
    await guest.until_mounted(POINT)
    await agent.kill()


@pytest.mark.parametrize("verb", ["lock", "eject"])
async def test_a_table_that_leads_elsewhere_is_released_by_request_and_the_loss_is_said(
    guest: Guest, agent: InstalledAgent, medium: Path, verb: str
) -> None:
    await plugged(guest, agent, medium)
    await guest.sh(
        f"name=$(dmsetup ls | awk '/caam-/ {{ print $1 }}'); echo unsynced >{POINT}/file\n"
        "dmsetup suspend --noflush --nolockfs $name\n"
        "dmsetup load $name --table \"0 $(dmsetup table $name | cut -d' ' -f2) zero\"\n"
        "dmsetup resume --noflush --nolockfs $name"
    )
    await agent.start()
    await until_state(guest, "failed")
    asked = await guest.run("caam-hotplug", verb, "cartridge-01", check=False)
    assert "its mapping led elsewhere" in asked.stdout + asked.stderr
    assert asked.returncode == (0 if verb == "lock" else 1)
    await until_state(guest, "locked")
    assert await agent.leftovers() == []
    await guest.run("caam-hotplug", "unlock", "cartridge-01")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
