"""What an earlier run of the agent has left that no volume has any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from caam_hotplug import names
from caam_hotplug.config.rules import mount_globs
from caam_hotplug.daemon.changed_disks import ChangedDisks
from caam_hotplug.daemon.defects import guarded
from caam_hotplug.errors import HotplugError, is_passing
from caam_hotplug.model import Mapping
from caam_hotplug.volume.leftovers import release_orphan, remove_left_paths
from caam_hotplug.volume.operations import fields
from caam_hotplug.volume.record import Context
from caam_hotplug.volume.retry_delay import RetryDelay
from caam_hotplug.volume.worker import Worker

log = logging.getLogger(__name__)


class Orphans:
    """Releases them, each beside the others. Synchronization: loop only."""

    def __init__(
        self,
        context: Context,
        changed: ChangedDisks,
        run: Callable[[Coroutine[Any, Any, None], Callable[[], str]], None],
    ) -> None:
        """`run` runs work to its end, and names it if a stop has to wait for it."""
        self._context = context
        self._changed = changed
        self._run = run
        self._stopping = asyncio.Event()

    def close(self) -> None:
        """Try nothing again: the agent stops."""
        self._stopping.set()

    def release(self, orphan: Mapping) -> None:
        """Release the mapping, and whatever is mounted from it; a failure is logged."""
        self._run(self._released(orphan), partial(str, f"mapping {orphan.name}"))

    def remove_directories(self) -> None:
        """Remove directories at the paths of rules that no volume and no orphan uses."""
        if mount_globs(self._context.rules):
            words = "remove directories at the paths of rules"
            self._run(guarded(remove_left_paths(self._context), words), lambda: words)

    async def _released(self, orphan: Mapping) -> None:
        words = f"leftover {orphan.name}"
        worker = self._context.new_worker(words)
        volume = names.volume_of_dm_uuid(orphan.uuid)
        extra = fields("leftover-released", VOLUME=volume, MAPPING=orphan.name)
        log.warning("releasing leftover mapping %s: its medium has gone", orphan.name, extra=extra)
        with self._changed.without_volume(orphan):
            work = self._until_released(worker, orphan)
            await guarded(work, f"release {words}", mapping=orphan.name)

    async def _until_released(self, worker: Worker, orphan: Mapping) -> None:
        """Release it; again after an error that passes by itself."""
        delay, said = RetryDelay(), ""
        while (error := await self._failure(worker, orphan)) is not None:
            is_over = self._stopping.is_set() or not is_passing(error)
            words = f"{error}{'' if is_over else '; it is tried again'}"
            if words != said:
                log.error("release leftover mapping %s: %s", orphan.name, words)
            said = words
            if not is_over:
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._stopping.wait(), delay.next_s())
            if is_over or self._stopping.is_set():
                return

    async def _failure(self, worker: Worker, orphan: Mapping) -> Exception | None:
        """Try to release it, and return what made that fail."""
        kernel, dm_worker = self._context.kernel, self._context.dm_worker
        try:
            await release_orphan(kernel, worker, dm_worker, self._context.mount_points, orphan)
        except (HotplugError, OSError) as error:
            return error
        return None
