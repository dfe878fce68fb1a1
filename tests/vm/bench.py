"""`make bench`: the agent beside other ways to serve a medium, measured in one guest."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shlex
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from bench import chart, figures, goals, measure, storms, systems, tables
from vm import extension, installed, machine, media, soak
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
    print(f"\n{tables.tables(report)}")
    OUTPUT.mkdir(exist_ok=True)
    for name, text in (
        ("bench.json", json.dumps(report, indent=1)),
        ("bench.txt", tables.tables(report)),
        ("bench.svg", chart.chart(report)),
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


async def put_back(guest: Guest) -> None:
    """What `prepare` brought is not in the guest, nor what udisks keeps."""
    brought = (f"{extension.FOLDER}/{systems.EXTENSION}.raw", systems.PROGRAMS)
    await guest.run("rm", "-rf", *map(str, brought), "/media/root", "/var/lib/udisks2")


async def _bring_packages(guest: Guest) -> None:
    """The extension that a system needs lies in the guest, to be merged at its turn."""

    def made() -> Path:
        base = machine.saved().image.base
        return extension.extension(systems.EXTENSION, systems.PACKAGES, base)

    image = await asyncio.to_thread(made)
    await guest.write(f"{extension.FOLDER}/{image.name}", image.read_bytes())


def compiled() -> bytes:
    """The program L, which needs nothing of the guest's. Raises: CalledProcessError."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "limit"
        flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
        subprocess.run(["gcc", *flags, "-o", made, SOURCE], check=True)
        return made.read_bytes()


async def measured(guest: Guest, *options: str) -> int:
    """The systems were measured in this guest, with these options. Returns: the exit status."""
    asked = measure.options().parse_args([*options, REPORT])
    if "cycles" in asked.what and any(systems.SYSTEMS[name].extension for name in asked.systems):
        await _bring_packages(guest)
    async with contextlib.AsyncExitStack() as held:
        if "storm" in asked.what:
            await held.enter_async_context(_sticks(guest, asked.sticks))
        return await soak.shown(guest, f"-m bench.measure {shlex.join(options)} {REPORT}")


@asynccontextmanager
async def _sticks(guest: Guest, count: int) -> AsyncIterator[None]:
    """What the guest wishes of so many USB sticks is done; none is plugged on the way out."""
    with tempfile.TemporaryDirectory() as folder:
        labels = storms.labels(count)
        images = [media.make_medium(Path(folder) / n, n, size_mib=storms.SIZE_MB) for n in labels]
        await guest.run("mkfifo", str(storms.WISHES))
        granting = asyncio.create_task(_grant(guest, images))
        try:
            yield
        finally:
            granting.cancel()
            await asyncio.gather(granting, return_exceptions=True)
            await guest.pull_all()
            await guest.run("rm", str(storms.WISHES))


async def _grant(guest: Guest, images: list[Path]) -> None:
    """The guest's wishes were granted, up to the one that it be over."""
    while True:
        wish = await guest.run("cat", str(storms.WISHES), timeout_s=soak.DEADLINE_S)
        match wish.stdout:
            case "plug":
                for image in images:
                    await guest.plug_usb(image)
            case "pull":
                await guest.pull_all()
            case _:
                return


async def reported(guest: Guest) -> figures.Report:
    """The report of the run in the guest, with what it comes to."""
    written = json.loads(await guest.read(REPORT))
    told = {"date": time.strftime("%Y-%m-%d"), "medium": MEDIUM, **written}
    return goals.with_verdicts(figures.with_figures(told))
