"""A second agent ends before it touches anything."""

from __future__ import annotations

from pathlib import Path

from e2e.support import POINT
from vm.guest import Guest
from vm.installed import NEVER, NO_RESTART, UNIT, InstalledAgent

ANOTHER_AGENT = 75
RUN = "caam-hotplug run"
"""As it is started in a terminal, without the service manager."""


async def test_the_service_beside_an_agent_in_a_terminal_fails_once(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.stop()
    await guest.sh(f"rm {NO_RESTART}; systemctl daemon-reload")
    await guest.sh(f"setsid {RUN} </dev/null >/run/terminal 2>&1 & echo $! >/run/terminal.pid")
    await guest.until("grep -q ready: /run/terminal")
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    started = await guest.run("systemctl", "start", UNIT, check=False)
    assert started.returncode == 1
    show = "systemctl show -p ExecMainStatus,NRestarts,ActiveState --value caam-hotplug | xargs"
    status, restarts, state = (await guest.sh(show)).stdout.split()
    assert {status, restarts, state} == {"0", f"{ANOTHER_AGENT}", "failed"}
    await agent.until_said(f"process {(await terminal(guest))} is the agent already")
    assert (await guest.run("caam-hotplug", "status")).stdout.count("mounted") == 1
    await guest.sh("kill -9 $(cat /run/terminal.pid)")
    await agent.start()  # at once, and it adopts what the other has mounted
    await agent.until_said("adopting its mount")
    await guest.write(NO_RESTART, NEVER)
    await guest.run("systemctl", "daemon-reload")


async def terminal(guest: Guest) -> str:
    return (await guest.read("/run/terminal.pid")).decode().strip()
