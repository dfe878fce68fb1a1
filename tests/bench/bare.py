"""The least that an agent in Python needs: asyncio, pyudev, a monitor; then it reports READY."""

from __future__ import annotations

import asyncio
import os
import socket

import pyudev


async def main() -> None:
    """Report ready, and stay idle until killed."""
    monitor = pyudev.Monitor.from_netlink(pyudev.Context())
    monitor.filter_by("block")
    monitor.start()
    asyncio.get_running_loop().add_reader(monitor.fileno(), monitor.poll, 0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as outlet:
        outlet.sendto(b"READY=1", os.environ["NOTIFY_SOCKET"].replace("@", "\0", 1))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
