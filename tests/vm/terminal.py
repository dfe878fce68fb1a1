"""Connects a user's terminal to the guest's console."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import termios
import tty
from collections.abc import Iterator
from pathlib import Path
from typing import Final

EXIT_KEY: Final = b"\x1d"
"""Control-], as in telnet."""


@contextlib.contextmanager
def _raw(terminal: int) -> Iterator[None]:
    before = termios.tcgetattr(terminal)
    tty.setraw(terminal)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)


async def bridged(socket: Path) -> None:
    """Send input to the guest and its output to the terminal, until Control-]."""
    reader, writer = await asyncio.open_unix_connection(socket)
    terminal = sys.stdin.fileno()
    closed = asyncio.Event()

    def typed() -> None:
        data = os.read(terminal, 4096)
        before, exit_key, _ = data.partition(EXIT_KEY)
        writer.write(before)
        if exit_key or not data:
            closed.set()

    async def written() -> None:
        while data := await reader.read(65536):
            os.write(sys.stdout.fileno(), data)
        closed.set()

    print("A root shell in the guest; Control-] leaves, and the guest is gone.", flush=True)
    columns, rows = os.get_terminal_size(terminal)
    loop = asyncio.get_running_loop()
    output = asyncio.create_task(written())
    with _raw(terminal):
        writer.write(f" stty rows {rows} cols {columns}; clear\n".encode())
        loop.add_reader(terminal, typed)
        try:
            await closed.wait()
        finally:
            loop.remove_reader(terminal)
            output.cancel()
            await asyncio.gather(output, return_exceptions=True)
            writer.close()
    print()
