"""The agent is killed at any time and started again: it adopts mounts and releases leftovers."""

from __future__ import annotations

from pathlib import Path

from e2e.support import ON_A_LIVE_MAPPING, POINT, labelled, slow_caam
from vm.boards import Board
from vm.guest import Guest
from vm.installed import NEVER, NO_RESTART, UNIT, InstalledAgent

WRITER = f"""
i=0; while echo $i >> {POINT}/log && sync {POINT}/log; do i=$((i+1)); done >/dev/null 2>/tmp/errors
"""


@ON_A_LIVE_MAPPING
async def test_a_mounted_medium_is_adopted_without_interruption(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
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


@ON_A_LIVE_MAPPING
async def test_an_agent_killed_while_unlocking_is_started_by_systemd_and_starts_over(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
) -> None:
    await guest.sh(f"rm {NO_RESTART}; systemctl daemon-reload")
    await agent.start()
    await slow_caam(guest, 5000, board)
    await guest.plug_usb(medium)
    await agent.until_said("unlocking")
    await guest.sh(f"systemctl kill -s KILL --kill-whom=main {UNIT}")
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await guest.write(NO_RESTART, NEVER)
    await guest.run("systemctl", "daemon-reload")


@ON_A_LIVE_MAPPING
async def test_changes_between_a_crash_and_the_next_start_are_noticed(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path, tmp_path: Path
) -> None:
    await guest.write(NO_RESTART, b"[Service]\nRestart=always\nRestartSec=5\n")
    await guest.sh("systemctl daemon-reload; cp /data/caam/cartridge-0{1,2}.bb")
    await agent.start()
    first = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(f"systemctl kill -s KILL --kill-whom=main {UNIT}")
    await first.pull()
    await guest.plug_usb(labelled(tmp_path, "cartridge-02", board))
    await guest.until_mounted("/run/media/cartridge-02")
    await guest.until_unmounted(POINT)
    await guest.write(NO_RESTART, NEVER)
    await guest.run("systemctl", "daemon-reload")


@ON_A_LIVE_MAPPING
async def test_a_restart_with_keep_interrupts_no_writer_and_a_clean_stop_locks(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
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
