"""Readers of cards of which udev takes no care: polled, and read once a card is in.

The kernel reports that a card was changed, and no more. It reads the new card when the disk is
opened next (bdev_check_media_change in block/disk-events.c), which is udev's work where udevd runs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from caam_hotplug.daemon.defects import guarded
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import HotplugError, UnknownError
from caam_hotplug.kernel import card_readers, changed_disk, sysfs, udev
from caam_hotplug.kernel.sysfs import Source
from caam_hotplug.kernel.uevents import Uevent
from caam_hotplug.volume.worker import Worker

log = logging.getLogger(__name__)


class Readers:
    """Synchronization: loop only."""

    def __init__(
        self,
        source: Source,
        supervisor: Supervisor,
        new_worker: Callable[[str], Worker],
        was_read: Callable[[str], None],
    ) -> None:
        """`was_read` is called with the name of a disk that was opened, so that it is looked at."""
        self._has_udev = source == "udev"
        self._run = supervisor.run
        self._new_worker = new_worker
        self._was_read = was_read
        self._unread: dict[str, asyncio.TimerHandle] = {}
        """When to open a disk that udev has not reported since its card was changed."""

    def begin(self) -> None:
        """Have the readers polled that are present."""
        if not self._has_udev:
            with suppress(UnknownError):  # which the list of what is present says as well
                for name in sysfs.block_names():
                    self._poll_if_nobody_does(name)

    def end(self) -> None:
        """Open no more disks."""
        for timer in self._unread.values():
            timer.cancel()
        self._unread.clear()

    def reported(self, reporter: Source, uevent: Uevent) -> None:
        """Note an event of a disk."""
        name = uevent.name
        if sysfs.NEVER_MEDIA.match(name):
            return
        if (timer := self._unread.pop(name, None)) is not None:
            timer.cancel()
        if reporter == "udev":
            return
        if uevent.action == "add" and not self._has_udev:
            self._poll_if_nobody_does(name)
        if uevent.properties.get("DISK_MEDIA_CHANGE") == "1":
            after_s = udev.UDEV_PATIENCE_S if self._has_udev else 0.0
            loop = asyncio.get_running_loop()
            self._unread[name] = loop.call_later(after_s, self._read_soon, name)

    def _poll_if_nobody_does(self, name: str) -> None:
        if sysfs.NEVER_MEDIA.match(name):
            return
        try:
            is_unpolled = card_readers.is_unpolled(name)
        except UnknownError as error:
            log.warning("%s; if it is a reader, a card that is put in may not be noticed", error)
            return
        if is_unpolled:
            self._begin(name, self._poll(name))

    def _read_soon(self, name: str) -> None:
        del self._unread[name]
        self._begin(name, self._read(name))

    def _begin(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        words = f"/dev/{name}: look for a card"
        self._run(guarded(work, words), partial(str, words))

    async def _poll(self, name: str) -> None:
        await self._call(name, "poll it for cards", partial(card_readers.poll, name))

    async def _read(self, name: str) -> None:
        await self._call(name, "read the card", partial(changed_disk.read_table, f"/dev/{name}"))
        self._was_read(name)

    async def _call(self, name: str, words: str, step: Callable[[], None]) -> None:
        """Take the step on a worker of the reader's own, which may hang."""
        worker = self._new_worker(f"reader {name}")
        try:
            await worker.run(words, step, late=partial(_log_late, name, words))
        except (HotplugError, OSError) as error:
            log.warning("%s", error)


def _log_late(name: str, words: str, why: str | None) -> None:
    if why is not None:
        log.warning("/dev/%s: %s: %s", name, words, why)
