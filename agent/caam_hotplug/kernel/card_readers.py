"""Readers of cards that the kernel does not ask whether a card is in.

Most readers do not report a card that is put in. The kernel asks them now and then, in an interval
that is none unless somebody sets one (disk_events_poll_jiffies in block/disk-events.c). udev sets
it for all of them, to 2 s (60-block.rules of systemd).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import sysfs_tree
from caam_hotplug.kernel.ctypes_lib import reported_as

log = logging.getLogger(__name__)

_EVERY_MS: Final = "2000"
_DEFAULT: Final = "module/block/parameters/events_dfl_poll_msecs"
_SYS: Final = Path("/sys")
"""What is written goes by this path: the agent's own mount of sysfs is only for reading."""


def is_unpolled(disk: str, root: int | None = None) -> bool:
    """Whether the disk is a reader that would not notice a card.

    Not if the kernel polls it, if its driver reports cards by itself, or if somebody has said that
    it is not to be polled. Raises: UnknownError.
    """
    at, folder = sysfs_tree.root() if root is None else root, f"class/block/{disk}"

    def text(file: str) -> str:
        return sysfs_tree.text(at, file).strip()

    def look() -> bool:
        return (
            text(f"{folder}/events_poll_msecs") == "-1"  # the default
            and text(_DEFAULT) == "0"
            and text(f"{folder}/removable") == "1"
            and "media_change" in text(f"{folder}/events").split()
            and "media_change" not in text(f"{folder}/events_async").split()
        )

    return bool(sysfs_tree.known(disk, look))


def poll(disk: str, sys: Path = _SYS) -> None:
    """Have the kernel poll the disk for cards. Raises: KernelError. May wait for the reader."""
    with reported_as("poll", f"/dev/{disk}", KernelError):
        (sys / "class/block" / disk / "events_poll_msecs").write_text(_EVERY_MS)
    log.info("/dev/%s: nobody asked it for cards; the kernel polls it now", disk)
