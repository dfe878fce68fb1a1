"""A medium is safe to remove only if nothing of it is in use and all is written, and stays so."""

from __future__ import annotations

import re
from pathlib import Path

from e2e.support import ANY_BUS, POINT
from e2e.test_bus import until_state
from vm.guest import Completed, Guest
from vm.installed import InstalledAgent


async def plugged_with_a_neighbour(guest: Guest, agent: InstalledAgent, medium: Path) -> None:
    """Plug a disk with a second partition, of somebody else; start the agent."""
    await agent.configure(ANY_BUS)
    await guest.plug_scsi(medium)
    await guest.until("test -b /dev/sda1")
    await guest.sh(
        "udevadm settle; sgdisk -e -n 2:0:+8M -c 2:neighbour /dev/sda; udevadm settle; "
        "until test -b /dev/sda2; do :; done; mkfs.ext4 -q /dev/sda2; udevadm settle"
    )
    await agent.start()
    await guest.until_mounted(POINT)


async def ask(guest: Guest, verb: str, *options: str) -> Completed:
    return await guest.run("caam-hotplug", verb, *options, "cartridge-01", check=False)


async def test_a_medium_whose_neighbour_is_in_use_is_not_ejected_and_the_user_is_named(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await plugged_with_a_neighbour(guest, agent, medium)
    await guest.sh("mount /dev/sda2 /mnt; dd if=/dev/zero of=/mnt/dirty bs=64k count=16")
    refused = await ask(guest, "eject")
    assert refused.returncode == 1
    assert "mounted at /mnt" in refused.stderr
    assert "`lock` releases this volume alone" in refused.stderr
    await until_state(guest, "mounted")
    await guest.sh("umount /mnt")
    await guest.sh("sleep 1000 < /dev/sda2 >/dev/null 2>&1 & echo $! >/tmp/holder")
    pid = (await guest.sh("cat /tmp/holder")).stdout.strip()
    refused = await ask(guest, "eject")
    assert refused.returncode == 1
    assert f"pid {pid} (sleep) has /dev/sda2 open" in refused.stderr
    await until_state(guest, "locked")
    await guest.sh(f"test -b /dev/sda1 && test -b /dev/sda2; kill {pid}; udevadm settle")
    assert (await ask(guest, "eject")).stdout == "cartridge-01: safe to remove\n"
    assert (await guest.sh("ls /sys/class/block | grep ^sda")).stdout == "sda\n"


async def test_an_ejected_medium_is_held_also_after_kill_9_until_it_is_unlocked(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await plugged_with_a_neighbour(guest, agent, medium)
    assert (await ask(guest, "eject")).returncode == 0
    await agent.kill()
    await agent.start()
    await until_state(guest, "ejected")
    busy = await guest.sh("blockdev --rereadpt /dev/sda; mkfs.ext4 -q /dev/sda", check=False)
    assert busy.returncode != 0
    await guest.sh("udevadm trigger --settle --action=change /dev/sda")
    await until_state(guest, "ejected")
    assert (await guest.sh("ls /sys/class/block | grep ^sda")).stdout == "sda\n"
    assert (await ask(guest, "unlock")).stdout.startswith("cartridge-01: mounted")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await guest.sh("test -b /dev/sda2")


async def test_a_medium_that_is_not_powered_off_is_free_and_locked_once_its_table_is_read(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await plugged_with_a_neighbour(guest, agent, medium)
    assert (await ask(guest, "eject", "--no-power-off")).returncode == 0
    await until_state(guest, "ejected")
    await guest.sh("blockdev --rereadpt /dev/sda; udevadm settle")
    await until_state(guest, "locked")
    assert await agent.leftovers() == []
    await agent.kill()
    await agent.start()
    await until_state(guest, "locked")
    assert (await ask(guest, "unlock")).stdout.startswith("cartridge-01: mounted")


async def test_a_disk_that_the_kernel_took_offline_is_released_and_never_safe_to_remove(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await plugged_with_a_neighbour(guest, agent, medium)
    await guest.sh(f"echo lost > {POINT}/file; echo offline > /sys/block/sda/device/state")
    for _ in range(2):
        refused = await ask(guest, "eject")
        assert refused.returncode == 1
        assert "it is not safe to remove" in refused.stderr
        await until_state(guest, "locked")
    assert await agent.leftovers() == []
    locked = await ask(guest, "lock")
    assert re.search("not all that was written|what was written last may be lost", locked.stdout)
    await guest.sh("echo running > /sys/block/sda/device/state")
    assert "it is not safe to remove" in (await ask(guest, "eject")).stderr
    assert "safe to remove" not in (await guest.run("caam-hotplug", "status")).stdout
