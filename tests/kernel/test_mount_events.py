"""Changes of the mounts wake the loop that waits for them, and nothing else does."""

from __future__ import annotations

import asyncio
import os
from contextlib import closing
from pathlib import Path
from typing import Final

from caam_hotplug.kernel.mount_events import MountEvents
from kernel.witness import run

SETTLED_S: Final = 0.05
"""More than a wake takes that is due already."""
CHANGES: Final = {
    "mount": ("mount", "-t", "tmpfs", "none", "{0}"),
    "remount": ("mount", "-o", "remount,ro", "{0}"),
    "remount this mount": ("mount", "-o", "remount,bind,rw", "{0}"),
    "bind": ("mount", "--bind", "{0}", "{0}"),
    "detach": ("umount", "-l", "{0}"),
    "unmount": ("umount", "{0}"),
}


def test_each_change_of_the_mounts_wakes_the_loop_once(tmp_path: Path) -> None:
    point = tmp_path / "point"
    point.mkdir()
    woken: dict[str, int] = {}

    async def work() -> None:
        with closing(MountEvents()) as events:
            loop = asyncio.get_running_loop()
            times = 0

            def take() -> None:
                nonlocal times
                events.read()
                times += 1

            loop.add_reader(events, take)
            for change, command in CHANGES.items():
                times = 0
                run(*(each.format(point) for each in command))
                await asyncio.sleep(SETTLED_S)
                woken[change] = times
            times = 0
            run("mount", "-t", "tmpfs", "none", str(point))
            run("umount", str(point))
            os.listdir(point)
            events.read()
            await asyncio.sleep(SETTLED_S)
            woken["what was taken already"] = times
            loop.remove_reader(events)

    asyncio.run(work())
    assert woken == {**dict.fromkeys(CHANGES, 1), "what was taken already": 0}
