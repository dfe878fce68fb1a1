"""A medium is released by request whatever became of its partition and mapping meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.support import ANY_BUS, POINT
from e2e.test_bus import until_state
from vm.guest import Guest
from vm.installed import InstalledAgent

GROW = """
sgdisk -e /dev/sda; sgdisk -d 1 -n 1:2048:+{mib}M -c 1:cartridge-01 /dev/sda
partx --update --nr 1 /dev/sda; udevadm settle
"""
WRITER = f"while echo line >>{POINT}/log && sync {POINT}/log; do :; done >/dev/null 2>&1"


async def plugged(guest: Guest, agent: InstalledAgent, medium: Path) -> None:
    """Mount a medium with free space behind its partition, and kill the agent."""
    with medium.open("r+b") as file:
        file.truncate(96 << 20)
    await agent.configure(ANY_BUS)
    await agent.start()
    await guest.plug_scsi(medium)
    await guest.until_mounted(POINT)
    await agent.kill()


async def test_a_medium_that_has_grown_is_adopted_under_a_writer_and_then_ejected(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await plugged(guest, agent, medium)
    await guest.sh(f"({WRITER}) & echo $! >/tmp/writer")
    await guest.sh(GROW.format(mib=80))
    await agent.start()
    await until_state(guest, "mounted")
    lines = (await guest.sh(f"wc -l <{POINT}/log")).stdout
    await guest.until(f"test $(wc -l <{POINT}/log) -gt {int(lines)}")
    refused = await guest.run("caam-hotplug", "lock", "cartridge-01", check=False)
    assert "is in use" in refused.stderr
    await guest.sh("kill $(cat /tmp/writer); while pgrep -P $(cat /tmp/writer); do :; done")
    ejected = await guest.run("caam-hotplug", "eject", "cartridge-01")
    assert ejected.stdout == "cartridge-01: safe to remove\n"


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
