"""`make soak`, `make throughput`: long runs in a guest; progress and figures are shown here."""

from __future__ import annotations

import asyncio
import shlex
import sys
from typing import Final

from vm import installed, machine, media
from vm.guest import Guest

LOG: Final = "/var/tmp/soak"
UDEV_RULE: Final = (
    "mkdir -p /run/udev/rules.d; cp /src/rules/*.rules /run/udev/rules.d; udevadm control --reload"
)
CHECK_INTERVAL_S: Final = 5
DEADLINE_S: Final = 12 * 3600


async def soak(*options: str) -> int:
    """Run the soak in a new guest with these options. Returns: its exit status."""
    async with machine.restored() as guest:
        await guest.sh(UDEV_RULE)
        return await shown(guest, f"-m kernel.soak {shlex.join(options)}")


async def sabotage(*options: str) -> int:
    """Do by hand whatever can be done, at random, in a new guest. Returns: its exit status."""
    async with machine.restored() as guest:
        await guest.sh(UDEV_RULE)
        return await shown(guest, f"-m kernel.saboteur {shlex.join(options)}")


async def growth(cycles: int) -> int:
    """Plug and pull media beside the installed agent. Returns: 1 if it has grown."""
    async with machine.restored(installed.layer()) as guest:
        agent = installed.InstalledAgent(guest)
        await guest.sh(
            "cd /data/caam; for n in 2 3 4; do cp cartridge-01.bb cartridge-0$n.bb; done"
        )
        await agent.configure('[[rule]]\nname = "all"\nmatch.partlabel = "cartridge-*"\n')
        await agent.start()
        return await shown(guest, f"-m kernel.growth {cycles}")


async def throughput(*options: str) -> int:
    """Measure in a guest whose kernel has both kinds of keys. Returns: its exit status."""
    async with machine.restored() as guest:
        await guest.sh(f"{UDEV_RULE}; board-kernel both {media.OTPMK_A}")
        return await shown(guest, f"/src/tools/measure throughput {shlex.join(options)}")


async def shown(guest: Guest, program: str) -> int:
    """Run it with Python in the guest and show its output. Returns: its exit status."""
    command = (
        "cd /tmp; export PYTHONPATH=/src/agent:/src/tests PYTHONDONTWRITEBYTECODE=1; "
        f"exec python3 {program} >{LOG} 2>&1"
    )
    await guest.write(LOG, b"")
    running = asyncio.create_task(guest.sh(command, check=False, timeout_s=DEADLINE_S))
    read = 0
    while not running.done():
        await asyncio.wait({running}, timeout=CHECK_INTERVAL_S)
        read += await _show(guest, read)
    return (await running).returncode


async def _show(guest: Guest, read: int) -> int:
    """Show the new output; on a terminal each line replaces the one before."""
    new = (await guest.run("tail", "-c", f"+{read + 1}", LOG)).stdout
    text, newline, _ = new.rpartition("\n")
    for line in text.splitlines():
        passing = sys.stdout.isatty() and line.startswith(("cycle ", "damaged ", "step "))
        sys.stdout.write(f"\r\033[K{line}" if passing else f"{line}\n")
    sys.stdout.flush()
    return len(f"{text}{newline}".encode())
