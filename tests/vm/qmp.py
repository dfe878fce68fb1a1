"""A small asyncio client of QEMU's machine protocol (qmp-spec)."""

from __future__ import annotations

import asyncio
import contextlib
import json
from pathlib import Path
from typing import Any


class QmpError(Exception):
    """QEMU refused a command."""


class Qmp:
    """A connection; commands are answered in order, events are kept for their waiters."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._turn = asyncio.Lock()
        self._replies: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._deleted: set[str] = set()
        self._changed = asyncio.Condition()
        self._ended = False
        self._pump = asyncio.create_task(self._read())

    @classmethod
    async def connected(cls, socket: Path) -> Qmp:
        """Connect in command mode. Raises: OSError while QEMU does not listen yet."""
        reader, writer = await asyncio.open_unix_connection(socket, limit=1 << 24)
        await reader.readline()
        qmp = cls(reader, writer)
        await qmp("qmp_capabilities")
        return qmp

    async def __call__(self, command: str, **arguments: Any) -> Any:
        """Send a command and return its answer. Raises: QmpError; ConnectionError without QEMU."""
        async with self._turn:
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            request = {"execute": command, "arguments": named}
            if self._ended:
                raise ConnectionError(f"{command}: QEMU has ended")
            self._writer.write(json.dumps(request).encode() + b"\n")
            await self._writer.drain()
            reply = await self._replies.get()
            if reply is None:
                raise ConnectionError(f"{command}: QEMU has ended")
        if "error" in reply:
            raise QmpError(f"{command} {named}: {reply['error'].get('desc')}")
        return reply["return"]

    async def device_deleted(self, device: str) -> None:
        """Wait for QEMU's event that the device is gone. Raises: ConnectionError without QEMU."""
        async with self._changed:
            await self._changed.wait_for(lambda: device in self._deleted or self._ended)
            if device not in self._deleted:
                raise ConnectionError(f"{device}: QEMU has ended")
            self._deleted.discard(device)

    async def close(self) -> None:
        """Close the connection and end its task."""
        self._pump.cancel()
        await asyncio.gather(self._pump, return_exceptions=True)
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await self._reader.readline():
                await self._take(json.loads(line))
        self._ended = True
        await self._replies.put(None)
        async with self._changed:
            self._changed.notify_all()

    async def _take(self, message: dict[str, Any]) -> None:
        if "event" not in message:
            await self._replies.put(message)
        elif message["event"] == "DEVICE_DELETED":
            async with self._changed:
                # QEMU announces inner paths too, without a device.
                self._deleted.add(message["data"].get("device", ""))
                self._changed.notify_all()
