"""The agent installed in a guest as a board would have it, run as its systemd service."""

from __future__ import annotations

import io
import py_compile
import shlex
import tarfile
import tempfile
from pathlib import Path
from typing import Final

from vm import cache
from vm.guest import Guest
from vm.machine import Layer

REPOSITORY: Final = Path(__file__).resolve().parents[2]
PACKAGE: Final = REPOSITORY / "agent" / "caam_hotplug"
UNIT: Final = "caam-hotplug.service"
SOCKET: Final = "caam-hotplug.socket"
UNITS: Final = (
    UNIT, SOCKET, "caam-hotplug-holders.socket", "caam-hotplug-holders@.service",
)  # fmt: skip
NO_RESTART: Final = f"/etc/systemd/system/{UNIT}.d/no-restart.conf"
"""In the saved guest: an agent that a test kills stays dead until the test starts it."""
NEVER: Final = b"[Unit]\nConditionPathExists=!/run/stays-dead\n[Service]\nRestart=no\n"
"""What is in that file; after a kill no event starts it either."""

_BLOBS: Final = "/data/caam"
_BLOBS_AS_MADE: Final = "/var/lib/blobs-as-made"

_PROGRAM: Final = '#!/bin/sh\nexec /usr/bin/python3 -m caam_hotplug.cli "$@"\n'


class InstalledAgent:
    """The service in the guest: started, stopped, killed; what it says, what it holds."""

    def __init__(self, guest: Guest, *, since: str = "") -> None:
        """`since`: the journal's cursor after which it is read."""
        self.guest = guest
        self._journal = ["journalctl", "-u", UNIT, "-o", "cat", "--no-pager"]
        if since:
            self._journal.append(f"--after-cursor={since}")

    @classmethod
    async def into(cls, guest: Guest) -> InstalledAgent:
        """The agent's package, program, udev rule and unit are in place; it does not run yet."""
        await _install(guest, _package())
        return cls(guest)

    async def configure(self, toml: str) -> None:
        """The configuration that the next start reads."""
        await self.guest.write("/etc/caam-hotplug/agent.toml", toml.encode())

    async def start(self) -> None:
        """The service runs with the configuration there is, and has said that it is ready."""
        started = await self.guest.run("systemctl", "restart", UNIT, check=False)
        assert started.returncode == 0, await self.journal()

    async def stop(self) -> None:
        """The service has stopped in order."""
        await self.guest.run("systemctl", "stop", UNIT)

    async def kill(self) -> None:
        """The agent was killed without a chance to do anything, and stays dead."""
        await self.guest.sh(
            f"touch /run/stays-dead; systemctl kill -s KILL --kill-whom=main {UNIT}; "
            f"while systemctl is-active -q {UNIT}; do :; done; "
            f"systemctl stop {SOCKET}; rm /run/stays-dead; "
            f"systemctl reset-failed {UNIT} {SOCKET} 2>/dev/null || true"
        )

    async def journal(self) -> str:
        """All that the service has said, a line each."""
        return (await self.guest.run(*self._journal)).stdout

    async def until_said(self, pattern: str, *, times: int = 1, deadline_s: float = 120) -> str:
        """The service has said something that the extended regular expression matches.

        Returns the matching lines. Raises: AssertionError with the journal after the deadline.
        """
        follow = shlex.join([*self._journal, "-n", "all", "-f"])
        script = f"grep -m{times} -E -- {shlex.quote(pattern)} < <({follow})"
        done = await self.guest.run(
            "timeout", f"{deadline_s}", "bash", "-c", script, check=False,
            timeout_s=deadline_s + 10,
        )  # fmt: skip
        assert done.returncode == 0, f"not said: {pattern}\n{await self.journal()}"
        return done.stdout

    async def main_pid(self) -> int:
        """The agent's process."""
        shown = await self.guest.run("systemctl", "show", "-p", "MainPID", "--value", UNIT)
        return int(shown.stdout)

    async def leftovers(self) -> list[str]:
        """What of the agent's is in the kernel and in the tree; empty when nothing is left.

        A key that was unlinked is listed for a grace period more, and one whose usage count is 0
        until the kernel's collector comes by (security/keys/gc.c).

        Raises: AssertionError if a key remains.
        """
        await self.guest.until("awk '/caam-hotplug/ && $3 != 0 { exit 1 }' /proc/keys")
        found = await self.guest.sh(
            "dmsetup info -c --noheadings -o uuid,name 2>/dev/null | grep CAAM-HOTPLUG || true\n"
            "grep ' /run/media/' /proc/self/mountinfo || true\n"
            "ls -d /run/media/* 2>/dev/null || true"
        )
        return found.stdout.splitlines()


def layer() -> Layer:
    """A guest in which the agent is installed, and has run once."""
    package = _package()

    async def prepare(guest: Guest) -> None:
        await guest.write(NO_RESTART, NEVER)
        await guest.sh(f"cp -a {_BLOBS} {_BLOBS_AS_MADE}")
        await _install(guest, package)
        await InstalledAgent(guest).start()
        await InstalledAgent(guest).stop()

    return Layer("agent", cache.key_of(package, Path(__file__)), prepare)


async def put_back(guest: Guest) -> None:
    """Media, configuration, blobs and mount points are as they were in the saved guest.

    Raises: AssertionError if the agent has left anything behind.
    """
    assert await InstalledAgent(guest).leftovers() == []
    await guest.pull_all()
    await guest.until("! ls /sys/class/block | grep -E '^(sd|mmcblk)'")
    await guest.sh(
        f"rm -rf /etc/caam-hotplug /run/media/* {_BLOBS}; cp -a {_BLOBS_AS_MADE} {_BLOBS}; "
        f"udevadm settle; systemctl reset-failed {UNIT} 2>/dev/null || true"
    )


async def _install(guest: Guest, package: bytes) -> None:
    await guest.write("/tmp/agent.tar", package)
    await guest.sh(
        "tar -C / -xf /tmp/agent.tar && rm /tmp/agent.tar && "
        "grep -q ^caam-hotplug: /etc/group || echo caam-hotplug:x:900: >>/etc/group; "
        "systemctl daemon-reload && udevadm control --reload && systemctl reload dbus"
    )


def _package() -> bytes:
    return _tar(
        {
            "usr/bin/caam-hotplug": _PROGRAM.encode(),
            "etc/udev/rules.d/50-caam-hotplug.rules": _read("rules/50-caam-hotplug.rules"),
            "usr/share/dbus-1/system.d/org.caamhotplug1.conf": _read(
                "config/org.caamhotplug1.conf"
            ),
            **{f"etc/systemd/system/{unit}": _read(f"config/{unit}") for unit in UNITS},
            **_compiled_package("usr/lib/python3/dist-packages/caam_hotplug"),
        }
    )


def _read(path: str) -> bytes:
    return (REPOSITORY / path).read_bytes()


def _compiled_package(target: str) -> dict[str, bytes]:
    """Sources and bytecode: compiling in the guest would take seconds at every start."""
    files: dict[str, bytes] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for source in sorted(PACKAGE.rglob("*.py")):
            name = source.relative_to(PACKAGE)
            compiled = Path(scratch) / "compiled"
            py_compile.compile(
                str(source),
                cfile=str(compiled),
                dfile=f"/{target}/{name}",
                doraise=True,
                invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
            )
            files[f"{target}/{name}"] = source.read_bytes()
            cached = name.parent / "__pycache__" / f"{name.stem}.cpython-311.pyc"
            files[f"{target}/{cached}"] = compiled.read_bytes()
    return files


def _tar(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            member.mode = 0o755 if name.startswith("usr/bin/") else 0o644
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()
