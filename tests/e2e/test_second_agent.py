"""A second agent ends before it touches anything, wherever it is started from."""

from __future__ import annotations

from pathlib import Path

from e2e.support import POINT
from vm.guest import Guest
from vm.installed import NEVER, NO_RESTART, SOCKET, UNIT, InstalledAgent

ANOTHER_AGENT = 75
ELSEWHERE = (
    "",
    "unshare --net",
    "unshare --mount",
    "unshare --mount sh -c 'mount -t tmpfs none /run && exec \"$@\"' sh",
    "unshare --mount --net --uts --ipc --cgroup",
)
"""Commands that start a program in namespaces of its own, the first in none."""
UNSEEN = "unshare --pid --fork --mount-proc"
"""In a PID namespace, from which the first agent cannot be seen."""
RUN = "caam-hotplug run"
"""As it is started in a terminal, without the service manager."""
SETTLED = "cat /proc/self/mountinfo; dmsetup table; dmsetup info -c -o name,open; ls -l /run/media"


async def test_a_second_agent_in_any_namespace_ends_and_touches_nothing(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before = (await guest.sh(SETTLED)).stdout
    first = await agent.main_pid()
    seen = [(where, f"process {first}") for where in ELSEWHERE]
    for where, who in [*seen, (UNSEEN, "a process of another PID namespace")]:
        second = await guest.sh(f"timeout 60 {where} {RUN}", check=False)
        assert second.returncode == ANOTHER_AGENT, f"{where}: {second.stderr}"
        assert second.stderr == (
            f"caam-hotplug: run the agent: {who} is the agent already, and goes on; to replace "
            "it, stop it first\n"
        )
        assert (await guest.sh(SETTLED)).stdout == before
    assert await agent.main_pid() == first
    await guest.run("caam-hotplug", "eject", "--no-power-off", "cartridge-01")


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
    await guest.sh("udevadm trigger --settle --action=change /sys/class/block/sd?")
    show = "systemctl show -p ExecMainStatus,NRestarts,ActiveState --value caam-hotplug | xargs"
    status, restarts, state = (await guest.sh(show)).stdout.split()
    assert {status, restarts, state} == {"0", f"{ANOTHER_AGENT}", "failed"}
    assert (await guest.run("systemctl", "is-active", SOCKET, check=False)).stdout == "inactive\n"
    await agent.until_said(f"process {(await terminal(guest))} is the agent already")
    assert (await guest.run("caam-hotplug", "status")).stdout.count("mounted") == 1
    await guest.sh("kill -9 $(cat /run/terminal.pid)")
    await agent.start()  # at once, and it adopts what the other has mounted
    await agent.until_said("adopting its mount")
    await guest.write(NO_RESTART, NEVER)
    await guest.run("systemctl", "daemon-reload")


async def terminal(guest: Guest) -> str:
    return (await guest.read("/run/terminal.pid")).decode().strip()


async def test_an_agent_started_while_another_stops_slowly_leaves_it_alone(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium, slow=True)
    await guest.until_mounted(POINT)
    await guest.throttle(stick, 16 << 10)
    await guest.sh(f"head -c 512K /dev/urandom | tee /run/written >{POINT}/written")
    await guest.run("systemctl", "stop", "--no-block", UNIT)
    await agent.until_said("^stopping")
    second = await guest.sh(RUN, check=False)
    assert second.returncode == ANOTHER_AGENT
    await guest.throttle(stick, 0)
    await guest.until_unmounted(POINT)
    await agent.start()
    await guest.until_mounted(POINT)
    await guest.run("cmp", "/run/written", f"{POINT}/written")
    await guest.run("rm", "/run/written")


async def test_other_commands_do_not_wait_for_the_agent(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.start()
    assert (await guest.run("caam-hotplug", "status", check=False)).returncode == 0
    assert (await guest.run("caam-hotplug", "doctor", check=False)).returncode in {0, 3}
    dry = await guest.run("caam-hotplug", "provision", "/dev/null", "--label", "x", check=False)
    assert "is the agent already" not in dry.stderr
