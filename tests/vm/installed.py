"""The agent installed in a guest as on a board, run as its systemd service."""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Final, Literal

from vm import cache, debian
from vm.guest import Guest
from vm.machine import Layer
from vm.media import OTPMK_A

UNIT: Final = "caam-hotplug.service"
SOCKET: Final = "caam-hotplug.socket"
HOLDERS_SOCKET: Final = "caam-hotplug-holders.socket"
AWAIT_UDEV: Final = os.environ.get("AWAIT_UDEV", "no")
"""With "yes", all agents in a test run wait for udev, though no configuration says so."""
_DEFAULT: Final = "await_udev: bool ="
_CONFIG: Final = "/usr/lib/caam-hotplug/caam_hotplug/config/loader.py"
NO_RESTART: Final = f"/etc/systemd/system/{UNIT}.d/no-restart.conf"
"""File in the saved guest: a killed agent stays dead until the test starts it."""
NEVER: Final = b"[Unit]\nConditionPathExists=!/run/stays-dead\n[Service]\nRestart=no\n"
"""Content of that file; after a kill no event starts the agent either."""

FOLLOW_S: Final = 30
"""How long `until_said` follows the journal before it begins anew."""

Kernel = Literal["nxp", "mainline"]
"""Support of the guest's kernel for the CAAM; see inside/board-kernel."""

_BLOBS: Final = "/data/caam"
_BLOBS_AS_MADE: Final = "/var/lib/blobs-as-made"


class InstalledAgent:
    """The service in the guest: start, stop, kill, journal and leftovers."""

    def __init__(self, guest: Guest, *, since: str = "") -> None:
        """`since`: cursor of the journal after which it is read."""
        self.guest = guest
        self._journal = ["journalctl", "-u", UNIT, "-o", "cat", "--no-pager"]
        if since:
            self._journal.append(f"--after-cursor={since}")

    async def configure(self, toml: str) -> None:
        """Write the configuration that the next start reads."""
        await self.guest.write("/etc/caam-hotplug/agent.toml", toml.encode())

    async def start(self) -> None:
        """Start the service with the present configuration, and wait until it is ready."""
        started = await self.guest.run("systemctl", "restart", UNIT, check=False)
        assert started.returncode == 0, await self.journal()

    async def stop(self) -> None:
        """Stop the service in order."""
        await self.guest.run("systemctl", "stop", UNIT)

    async def kill(self) -> None:
        """Kill the agent with SIGKILL, and prevent its restart."""
        await self.guest.sh(
            f"touch /run/stays-dead; systemctl kill -s KILL --kill-whom=main {UNIT}; "
            f"while systemctl is-active -q {UNIT}; do :; done; "
            f"systemctl stop {SOCKET}; rm /run/stays-dead; "
            f"systemctl reset-failed {UNIT} {SOCKET} 2>/dev/null || true"
        )

    async def journal(self) -> str:
        """Return the lines that the service has logged."""
        return (await self.guest.run(*self._journal)).stdout

    async def until_said(self, pattern: str, *, times: int = 1, deadline_s: float = 120) -> str:
        """Wait until the service has logged something that the extended regular expression matches.

        Returns the matching lines. Raises: AssertionError with the journal after the deadline.
        """
        # journalctl -f can miss a line for good, so it begins anew now and then.
        follow = shlex.join([*self._journal, "-n", "all", "-f"])
        found = f"grep -m{times} -E -- {shlex.quote(pattern)} < <({follow})"
        rounds = -(-deadline_s // FOLLOW_S)
        script = (
            f"for ((n = 0; n < {rounds}; n++)); do "
            f"timeout {FOLLOW_S} bash -c {shlex.quote(found)} && exit; done; exit 1"
        )
        done = await self.guest.run(
            "bash", "-c", script, check=False, timeout_s=deadline_s + 10 * rounds
        )
        assert done.returncode == 0, f"not logged: {pattern}\n{await self.journal()}"
        return done.stdout

    async def main_pid(self) -> int:
        """Return the agent's process ID."""
        shown = await self.guest.run("systemctl", "show", "-p", "MainPID", "--value", UNIT)
        return int(shown.stdout)

    async def leftovers(self) -> list[str]:
        """List what is left of the agent in the kernel and in the tree.

        An unlinked key is listed for a grace period, and one whose usage count is 0 until the
        kernel's collector has freed it (security/keys/gc.c).

        Raises: AssertionError if a key remains.
        """
        found = await self.guest.sh(
            "until awk '/caam-hotplug/ && $3 != 0 { exit 1 }' /proc/keys; do sleep 0.05; done\n"
            "dmsetup info -c --noheadings -o uuid,name 2>/dev/null | grep CAAM-HOTPLUG || true\n"
            "grep ' /run/media/' /proc/self/mountinfo || true\n"
            "ls -d /run/media/* 2>/dev/null || true",
            timeout_s=120,
        )
        return found.stdout.splitlines()


def layer(kernel: Kernel = "nxp") -> Layer:
    """Return a guest layer with the agent's Debian package, after one run of the agent."""
    package = debian.package().read_bytes()

    async def prepare(guest: Guest) -> None:
        await guest.write(NO_RESTART, NEVER)
        if kernel == "mainline":
            await guest.sh(f"rm {_BLOBS}/*; board-kernel mainline {OTPMK_A}", timeout_s=300)
        await guest.sh(f"cp -a {_BLOBS} {_BLOBS_AS_MADE}")
        await install(guest, package)
        if AWAIT_UDEV == "yes":
            await guest.sh(
                f"sed -i 's/{_DEFAULT} False/{_DEFAULT} True/' {_CONFIG}; "
                f"grep -q '{_DEFAULT} True' {_CONFIG}"
            )
        await guest.run("systemctl", "is-active", UNIT)
        await InstalledAgent(guest).stop()
        await guest.run("rm", "-r", "/etc/caam-hotplug")  # a test brings its own, or none

    name = "agent" if kernel == "nxp" else f"agent-{kernel}"
    return Layer(name, cache.key_of(debian.key(), Path(__file__), AWAIT_UDEV), prepare)


async def install(guest: Guest, package: bytes) -> None:
    """Install or upgrade this package with dpkg, and wait until the agent runs."""
    await guest.write("/tmp/agent.deb", package)
    await guest.sh("dpkg --install /tmp/agent.deb && rm /tmp/agent.deb", timeout_s=300)


async def put_back(guest: Guest) -> None:
    """Restore the saved guest's media, configuration, blobs and mount points.

    Raises: AssertionError if the agent has left anything, or a test has left its units
        different from those that the package installs.
    """
    assert await InstalledAgent(guest).leftovers() == []
    await guest.pull_all()
    await guest.sh(
        f"systemctl is-enabled {UNIT}; systemctl is-active {HOLDERS_SOCKET}\n"
        "while ls /sys/class/block | grep -qE '^(sd|mmcblk)'; do sleep 0.05; done\n"
        f"rm -rf /etc/caam-hotplug /run/media/* {_BLOBS}; cp -a {_BLOBS_AS_MADE} {_BLOBS}\n"
        f"udevadm settle; systemctl reset-failed {UNIT} 2>/dev/null || true",
        timeout_s=120,
    )
