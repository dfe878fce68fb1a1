"""A disk that is being ejected, or is ejected: the steps of the kernel, each on a worker."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TypeVar

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.api import EmptiedDisk
from caam_hotplug.model import Volume
from caam_hotplug.volume.record import Context
from caam_hotplug.volume.worker import Late

T = TypeVar("T")


class DiskHold:
    """A disk, from the request to eject it until it is unlocked or has gone. Loop only."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._worker = context.new_worker("disk")
        self._emptied: EmptiedDisk | None = None
        self.step = ""
        """What a request does to it now, in words; empty if there is no request."""
        self.is_held = False
        """Whether nobody else can use it."""

    @property
    def is_emptied(self) -> bool:
        """Whether the kernel has no partitions of it, as far as this is known."""
        return self._emptied is not None

    async def look_who_uses(self, volume: Volume, late: Late) -> list[str]:
        """Return who has mounted or mapped anything of it, but for the agent."""
        kernel = self._context.kernel
        return await self._call("look who uses it", late, partial(kernel.disk_users, volume))

    async def hold(self, volume: Volume, late: Late) -> None:
        """Hold the volume's disk. Raises: VolumeBusyError; HotplugError. Then nothing changed."""
        kernel = self._context.kernel
        hold = partial(kernel.empty_disk, volume)
        self._emptied = await self._call("hold the disk", late, hold)
        self.is_held = True

    async def power_off(self, late: Late) -> None:
        """Stop it, and switch its port off. Raises: HotplugError."""
        if self._emptied is not None:
            self.step = "power off"
            await self._call("power off", late, self._emptied.power_off)

    async def give_back(self, late: Late = lambda _why: None) -> None:
        """Have others use it again, without its partitions."""
        self.is_held = False
        if self._emptied is not None:
            with suppress(HotplugError, OSError):  # it is closed all the same (close(2))
                await self._call("give back the disk", late, self._emptied.close)

    async def restore(self, volume: Volume, late: Late) -> list[Volume]:
        """Have the kernel read its partitions again, and return them. Raises: HotplugError."""
        if self._emptied is None:  # an earlier run of the agent has emptied it
            await self.hold(volume, late)
        emptied = self._emptied
        if emptied is None:
            return []
        found = await self._call("read the partitions", late, emptied.restore)
        self._emptied, self.is_held = None, False
        return found

    async def _call(self, words: str, late: Late, function: Callable[[], T]) -> T:
        def said(why: str | None) -> None:
            late(None if why is None else f"{words}: {why}")

        return await self._worker.run(words, function, late=said)
