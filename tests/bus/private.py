"""A bus of the tests' own, with the policy of the system's and ours."""

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
STRANGER: Final = pwd.getpwnam("nobody").pw_uid
"""Somebody else than root; dbus-daemon lets in only whom the user database knows."""
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
"""The rules of /usr/share/dbus-1/system.conf, as far as they concern us."""


@dataclass(frozen=True, slots=True)
class Done:
    """What a client has left."""

    returncode: int
    stdout: str
    stderr: str


class PrivateBus:
    """A dbus-daemon, which can be stopped, held and started again at the same address."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = f"unix:path={folder}/socket"
        self._daemon: subprocess.Popen[bytes] | None = None

    def start(self, policy: str | None = None) -> None:
        """It takes connections. `policy`: in place of ours."""
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
        """It was killed."""
        if self._daemon is not None:
            self._daemon.kill()
            self._daemon.wait()
            self._daemon = None

    def hold(self) -> None:
        """It takes connections, and answers nobody."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """It answers again."""
        assert self._daemon is not None
        self._daemon.send_signal(signal.SIGCONT)

    async def busctl(self, *arguments: str, **options: Any) -> Done:
        """systemd's client."""
        return await run("busctl", f"--address={self.address}", *arguments, **options)

    async def gdbus(self, verb: str, *arguments: str, **options: Any) -> Done:
        """GLib's client."""
        return await run("gdbus", verb, "--address", self.address, *arguments, **options)

    async def cli(self, *arguments: str, **options: Any) -> Done:
        """Our own command line."""
        return await run(*program(*arguments), **options)


def program(*arguments: str) -> list[str]:
    """The command line `caam-hotplug` of this tree."""
    return [sys.executable, "-m", "caam_hotplug.cli.main", *arguments]


async def run(
    *command: str, user: int = 0, groups: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> Done:
    """The command has ended. `user`, `groups`: who runs it."""
    process = await begun(*command, user=user, groups=groups, env=env)
    stdout, stderr = await process.communicate()
    assert process.returncode is not None
    return Done(process.returncode, stdout.decode(), stderr.decode())


async def begun(
    *command: str, user: int = 0, groups: tuple[int, ...] = (), env: dict[str, str] | None = None
) -> asyncio.subprocess.Process:
    """The command runs, and can be interrupted even if this process was told to ignore that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell does in the background
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
    """The next line of its output that has these words."""
    assert process.stdout is not None
    async with asyncio.timeout(30):
        while line := (await process.stdout.readline()).decode():
            if words in line:
                return line
    raise AssertionError(f"not said: {words}")
