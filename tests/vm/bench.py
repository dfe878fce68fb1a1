"""`make bench`: the agent beside other ways to serve a medium, measured in one guest."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Final

from bench import figures, systems
from vm import extension, installed, machine, soak
from vm.guest import Guest

SOURCE: Final = machine.REPOSITORY / "tests/bench/limit.c"
OUTPUT: Final = machine.REPOSITORY / "build"
REPORT: Final = f"{systems.PROGRAMS}/report.json"
RULE: Final = '[[rule]]\nname = "any bus"\nmatch.partlabel = "cartridge-*"\n'
MEDIUM: Final = "disks of scsi_debug"


async def bench(*options: str) -> int:
    """It was measured, and told on the terminal and in build/. Returns: the exit status."""
    async with machine.restored(installed.layer()) as guest:
        await prepare(guest)
        status = await measured(guest, *options)
        if status != 0:
            return status
        report = await reported(guest)
    print(f"\n{figures.table(report)}")
    OUTPUT.mkdir(exist_ok=True)
    for name, text in (
        ("bench.json", json.dumps(report, indent=1)),
        ("bench.txt", figures.table(report)),
        ("bench.svg", figures.chart(report)),
    ):
        (OUTPUT / name).write_text(text)
        print(f"build/{name}")
    return 0


async def prepare(guest: Guest) -> None:
    """The agent is stopped, with a rule for the medium, and what is measured beside it is there."""
    agent = installed.InstalledAgent(guest)
    await agent.stop()
    await agent.configure(RULE)
    await guest.write(f"{systems.PROGRAMS}/limit", await asyncio.to_thread(compiled), 0o755)
    packages = await asyncio.to_thread(_packages)
    await guest.write(f"{extension.FOLDER}/{packages.name}", packages.read_bytes())


async def put_back(guest: Guest) -> None:
    """What `prepare` brought is not in the guest, nor what udisks keeps."""
    brought = (f"{extension.FOLDER}/{systems.EXTENSION}.raw", systems.PROGRAMS)
    await guest.run("rm", "-r", *map(str, brought), "/media/root", "/var/lib/udisks2")


def _packages() -> Path:
    base = machine.saved().image.base
    return extension.extension(systems.EXTENSION, systems.PACKAGES, base)


def compiled() -> bytes:
    """The program L, which needs nothing of the guest's. Raises: CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "limit"
        flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
        subprocess.run(["gcc", *flags, "-o", made, SOURCE], check=True)
        return made.read_bytes()


async def measured(guest: Guest, *options: str) -> int:
    """The systems were measured in this guest, with these options. Returns: the exit status."""
    return await soak.shown(guest, f"-m bench.cycles {shlex.join(options)} {REPORT}")


async def reported(guest: Guest) -> figures.Report:
    """The report of the run in the guest, with what its cycles amount to."""
    written = json.loads(await guest.read(REPORT))
    return figures.with_figures({"date": time.strftime("%Y-%m-%d"), "medium": MEDIUM, **written})
