"""`make bench`: the agent beside other systems that serve media, measured in one guest."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shlex
import subprocess
import tarfile
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
    """Measure; print the report and write it to build/. Returns: the exit status."""
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
    """Stop the agent, add a rule for the medium, and bring the programs to measure beside it."""
    agent = installed.InstalledAgent(guest)
    await agent.stop()
    await agent.configure(RULE)
    await guest.write(f"{systems.PROGRAMS}/limit", await asyncio.to_thread(compiled), 0o755)


async def put_back(guest: Guest) -> None:
    """Remove from the guest what `prepare` brought, and udisks's state."""
    paths = (f"{extension.FOLDER}/{systems.EXTENSION}.raw", systems.PROGRAMS)
    await guest.run("rm", "-rf", *map(str, paths), "/media/root", "/var/lib/udisks2")


async def _bring_packages(guest: Guest) -> None:
    """Copy the extension that a system needs into the guest; the guest merges it at its turn."""

    def made() -> Path:
        base = machine.saved().image.base
        return extension.extension(systems.EXTENSION, systems.PACKAGES, base)

    image = await asyncio.to_thread(made)
    await guest.write(f"{extension.FOLDER}/{image.name}", image.read_bytes())


async def _install(guest: Guest, checkout: Path) -> None:
    """Install the agent of this checkout beside the guest's own."""
    home = systems.BEFORE / "lib/caam-hotplug"
    archive = await asyncio.to_thread(_archived, checkout / "agent/caam_hotplug")
    await guest.write(f"{systems.BEFORE}/agent.tar", archive)
    program = (checkout / "config/program").read_bytes()
    await guest.write(f"{systems.BEFORE}/bin/caam-hotplug", program, 0o755)
    await guest.sh(
        f"mkdir -p {home}; tar -xf {systems.BEFORE}/agent.tar -C {home}; "
        f"ln -s /usr/lib/caam-hotplug/bundled {home}; python3 -m compileall -q {home}/caam_hotplug",
        timeout_s=300,
    )


def _archived(package: Path) -> bytes:
    with io.BytesIO() as written:
        with tarfile.open(fileobj=written, mode="w") as archive:
            archive.add(
                package,
                package.name,
                filter=lambda member: None if member.name.endswith("__pycache__") else member,
            )
        return written.getvalue()


def compiled() -> bytes:
    """Compile the program L, which needs no library of the guest. Raises: CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "limit"
        flags = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
        subprocess.run(["gcc", *flags, "-o", made, SOURCE], check=True)
        return made.read_bytes()


async def measured(guest: Guest, *options: str) -> int:
    """Measure the systems in this guest, with these options. Returns: the exit status."""
    parsed = measure.options().parse_args([*options, REPORT])
    if "cycles" in parsed.what and any(systems.SYSTEMS[name].extension for name in parsed.systems):
        await _bring_packages(guest)
    if "before" in parsed.systems:
        await _install(guest, parsed.before)
    async with contextlib.AsyncExitStack() as held:
        if "storm" in parsed.what:
            await held.enter_async_context(_sticks(guest, parsed.sticks))
        return await soak.shown(guest, f"-m bench.measure {shlex.join(options)} {REPORT}")


@asynccontextmanager
async def _sticks(guest: Guest, count: int) -> AsyncIterator[None]:
    """Carry out the guest's requests for this many USB sticks; pull all of them afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        labels = storms.labels(count)
        images = [media.make_medium(Path(folder) / n, n, size_mib=storms.SIZE_MB) for n in labels]
        await guest.run("mkfifo", str(storms.REQUESTS))
        serving = asyncio.create_task(_serve_requests(guest, images))
        try:
            yield
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            await guest.pull_all()
            await guest.run("rm", str(storms.REQUESTS))


async def _serve_requests(guest: Guest, images: list[Path]) -> None:
    """Carry out the guest's requests until it requests the end."""
    while True:
        request = await guest.run("cat", str(storms.REQUESTS), timeout_s=soak.DEADLINE_S)
        match request.stdout:
            case "plug":
                for image in images:
                    await guest.plug_usb(image)
            case "pull":
                await guest.pull_all()
            case _:
                return


async def reported(guest: Guest) -> figures.Report:
    """Return the report of the run in the guest, with its figures."""
    written = json.loads(await guest.read(REPORT))
    report = {"date": time.strftime("%Y-%m-%d"), "medium": MEDIUM, **written}
    return goals.with_verdicts(figures.with_figures(report))
