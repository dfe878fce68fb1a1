"""Killed at any moment and started again: the present is adopted, the orphaned swept."""

from __future__ import annotations

from pathlib import Path

from e2e.support import POINT, slow_caam
from vm.guest import Guest
from vm.installed import NO_RESTART, UNIT, InstalledAgent

WRITER = f"""
i=0; while echo $i >> {POINT}/log && sync {POINT}/log; do i=$((i+1)); done >/dev/null 2>/tmp/errors
"""


async def test_a_mounted_medium_is_adopted_without_interruption(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before = (await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")).stdout
    await guest.sh(f"({WRITER}) & echo $! > /tmp/writer")
    await agent.kill()
    await agent.start()
    await agent.until_said("adopting its mount")
    await guest.until(f"test $(wc -l < {POINT}/log) -gt 20")
    assert (await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")).stdout == before
    assert (await guest.sh("cat /tmp/errors")).stdout == ""
    await guest.sh("kill $(cat /tmp/writer)")
    await stick.pull()
    await agent.until_said("removed-unsafely")


async def test_a_medium_that_left_while_the_agent_was_dead_is_swept(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await agent.kill()
    await stick.pull()
    await guest.until("! test -e /sys/class/block/sda")
    assert await agent.leftovers() != []
    await agent.start()
    await agent.until_said("sweeping mapping caam-cartridge-01-")
    assert await agent.leftovers() == []


async def test_a_medium_changed_while_the_agent_was_dead_gets_the_mount_point(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await agent.kill()
    await stick.pull()
    await guest.until("! test -e /sys/class/block/sda")
    await stick.plug()
    await guest.until("test -b /dev/disk/by-partlabel/cartridge-01")
    await agent.start()
    await agent.until_said("mounted: at", times=2)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"


async def test_an_agent_killed_while_unlocking_is_started_by_systemd_and_starts_over(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh(f"rm {NO_RESTART}; systemctl daemon-reload")
    await slow_caam(guest, 5000)
    await guest.plug_usb(medium)
    await agent.until_said("unlocking")
    await guest.sh(f"systemctl kill -s KILL --kill-whom=main {UNIT}")
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"


async def test_a_half_made_mapping_and_an_empty_mount_point_are_taken_over(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    # As an agent leaves them that is killed between creating and activating, or before mounting.
    await agent.stop()
    await guest.plug_usb(medium)
    await guest.until("test -b /dev/disk/by-partlabel/cartridge-01")
    await guest.sh(
        "n=$(cat /sys/class/block/sda/diskseq)\n"
        "dmsetup create caam-cartridge-01-$n-1 -u CAAM-HOTPLUG-$n-1 --notable\n"
        "mkdir -p /run/media; mkdir -m 0 /run/media/cartridge-01 /run/media/stale"
    )
    await agent.start()
    await guest.until_mounted(POINT)
    await guest.until("! test -e /run/media/stale")


async def test_a_restart_with_keep_interrupts_no_writer_and_a_clean_stop_locks(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    rule = '[[rule]]\nname = "keep"\non_stop = "{}"\nmatch.partlabel = "cartridge-*"\n'
    await agent.configure(rule.format("keep"))
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(f"({WRITER}) & echo $! > /tmp/writer")
    await guest.run("systemctl", "restart", "caam-hotplug")
    await agent.until_said("adopting its mount")
    await guest.until(f"test $(wc -l < {POINT}/log) -gt 20")
    assert (await guest.sh("cat /tmp/errors")).stdout == ""
    await guest.sh("kill $(cat /tmp/writer)")
    await agent.configure(rule.format("lock"))
    await agent.kill()
    await agent.start()
    await agent.until_said("adopting its mount", times=2)
    await agent.stop()
    assert await agent.leftovers() == []
