"""`make soak`: the soak of tests/kernel in a guest, its progress and its figures here."""

from __future__ import annotations

import asyncio
import shlex
import sys
from typing import Final

from vm import machine
from vm.guest import Guest

LOG: Final = "/var/tmp/soak"
LOOKED_AT_EVERY_S: Final = 5
DEADLINE_S: Final = 12 * 3600


async def soak(*options: str) -> int:
    """The soak has run in a guest of its own, with these options. Returns: its exit status."""
    command = (
        "cd /tmp; mkdir -p /run/udev/rules.d; cp /src/rules/*.rules /run/udev/rules.d; "
        "udevadm control --reload; export PYTHONPATH=/src/agent:/src/tests; "
        f"exec python3 -m kernel.soak {shlex.join(options)} >{LOG} 2>&1"
    )
    async with machine.restored() as guest:
        await guest.write(LOG, b"")
        running = asyncio.create_task(guest.sh(command, check=False, timeout_s=DEADLINE_S))
        read = 0
        while not running.done():
            await asyncio.wait({running}, timeout=LOOKED_AT_EVERY_S)
            read += await _show(guest, read)
        return (await running).returncode


async def _show(guest: Guest, read: int) -> int:
    """What was said since; on a terminal each line takes the place of the one before."""
    said = (await guest.run("tail", "-c", f"+{read + 1}", LOG)).stdout
    text, newline, _ = said.rpartition("\n")
    for line in text.splitlines():
        passing = sys.stdout.isatty() and line.startswith(("cycle ", "damaged "))
        sys.stdout.write(f"\r\033[K{line}" if passing else f"{line}\n")
    sys.stdout.flush()
    return len(f"{text}{newline}".encode())
