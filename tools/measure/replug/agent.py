"""The running agent: what it says of the medium, and what it takes from the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sdbus

from caam_hotplug import names
from caam_hotplug.dbus import client, connection
from caam_hotplug.dbus.volume_view import ShownVolume

SYSTEMD: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", client.PROPERTIES)


@dataclass(frozen=True, slots=True)
class Agent:
    """The running agent, and what it says of the medium."""

    pid: int
    version: str
    systemd: str | None
    """Its version; None under another init."""
    volume: ShownVolume

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads so far.

        Source: clock_getcpuclockid(3); CPUCLOCK_SCHED in linux/posix-timers.h.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def memory_mb(self) -> dict[str, float]:
        """Read how much memory it has, by the names that proc(5) has in smaps_rollup."""
        _, *lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        parts = (line.partition(":") for line in lines)
        return {name: int(value.split()[0]) * 1024 / 1e6 for name, _, value in parts}


def ask(which: str) -> Agent:
    """Ask the agent for the medium. Raises: HotplugError if it does not run, or knows none such."""
    answers = []

    async def look(agent: client.Remote) -> None:
        call = agent.connection.call
        volume = await agent.read(await agent.volume(which))
        pid = await call(connection.BUS, "GetConnectionUnixProcessID", "s", names.BUS_NAME)
        try:
            _, systemd = await call(SYSTEMD, "Get", "ss", f"{SYSTEMD[0]}.Manager", "Version")
        except sdbus.SdBusBaseError:  # another init
            systemd = None
        answers.append(Agent(pid, (await agent.manager())["Version"], systemd, volume))

    client.run("pull", look)
    return answers[0]
