"""A private bus with the policy of the system bus and the agent's."""

from __future__ import annotations

import asyncio
import os
import pwd
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[2]
POLICY: Final = REPOSITORY / "config" / "org.caamhotplug1.conf"
OTHER_USER: Final = pwd.getpwnam("nobody").pw_uid
"""A user other than root. dbus-daemon accepts only users of the user database."""
LAX: Final = '<busconfig><policy context="default"><allow own="*"/><allow send_type="method_call"/>'
LAX_POLICY: Final = f"{LAX}</policy></busconfig>"

_SYSTEM: Final = """\
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
  "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={folder}/socket</listen>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>{folder}/ours.conf</include>
</busconfig>
"""
"""The rules of /usr/share/dbus-1/system.conf that concern the agent."""


@dataclass(frozen=True, slots=True)
class Done:
    """Exit status and output of a client."""

    returncode: int
    stdout: str
    stderr: str


class PrivateBus:
    """A dbus-daemon that can be stopped, held, and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:path={folder}/socket"
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self, policy: str | None = None) -> None:
        """Start the bus. `policy`: in place of the agent's."""
        (self.folder / "ours.conf").write_text(POLICY.read_text() if policy is None else policy)
        (self.folder / "bus.conf").write_text(_SYSTEM.format(folder=self.folder))
        (self.folder / "socket").unlink(missing_ok=True)
        self._daemon = subprocess.Popen(
            ["dbus-daemon", f"--config-file={self.folder}/bus.conf", "--nofork", "--nopidfile",
             "--print-address=1"],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self._daemon.stdout is not None
        with self._daemon.stdout as said:
            assert said.readline().startswith(b"unix:")
        (self.folder / "socket").chmod(0o666)

    def stop(self) -> None:
        """Kill the bus."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def hold(self) -> None:
        """Make the bus accept connections without answering."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Make the bus answer again."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)

    async def busctl(self, *arguments: str, **options: Any) -> Done:
        """Run the client of systemd."""
        return await run("busctl", f"--address={self.address}", *arguments, **options)

    async def gdbus(self, verb: str, *arguments: str, **options: Any) -> Done:
        """Run the client of GLib."""
        return await run("gdbus", verb, "--address", self.address, *arguments, **options)

    async def cli(self, *arguments: str, **options: Any) -> Done:
        """Run a command of caam-hotplug."""
        return await run(*program(*arguments), **options)


def program(*arguments: str) -> list[str]:
    """Return the command line of `caam-hotplug` in this tree."""
    return [sys.executable, "-m", "caam_hotplug.cli.main", *arguments]


async def run(
    *command: str, user: int = 0, groups: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> Done:
    """Run the command to its end. `user`, `groups`: those of its process."""
    process = await begun(*command, user=user, groups=groups, env=env)
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, stdout.decode(), stderr.decode())


async def begun(
    *command: str, user: int = 0, groups: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    """Start the command so that SIGINT interrupts it, even if this process ignores SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell does so for background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    who: dict[str, Any] = {}
    if user:
        who = {"user": user, "group": user, "extra_groups": groups}
    return await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY / "agent"), **(env or {})},
        cwd="/",
        **who,
    )


async def until(process: asyncio.subprocess.Process, words: str) -> str:
    """Return the next line of output that has the words."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := (await process.stdout.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"no line with: {words}")
