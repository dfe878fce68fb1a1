"""Cuts a mapping off its medium once that has gone, before anything is unmounted.

What a filesystem has not written yet must not reach another medium. A reader keeps its disk when
its card is changed, and the old mapping leads to the new card. So an error table comes first.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.volume.stop_signal import StopSignal
from caam_hotplug.volume.worker import Late, Worker, ended

log = logging.getLogger(__name__)

_TRIES: Final = 2


class CutOff:
    """The error table of one volume's mapping. Synchronization: loop only.

    It has a worker of its own: the volume's may hang in a flush, that of the mappings may wait for
    another volume.
    """

    def __init__(
        self,
        kernel: Kernel,
        stop: StopSignal,
        new_worker: Callable[[], Worker],
        late: Late,
        uuid: str,
    ) -> None:
        self.is_mapped = False
        """Whether the kernel may have the mapping."""
        self._kernel = kernel
        self._stop = stop
        self._new_worker = new_worker
        self._late = late
        self._uuid = uuid
        self._loading: asyncio.Task[Exception | None] | None = None
        self._live: asyncio.Future[None] | None = None
        """Done once the table is live, or could not be loaded; there while it is loaded."""
        stop.when_gone = self._begin

    async def done(self) -> Exception | None:
        """Wait until it is done, if the medium has gone, and return what made it fail.

        What has failed before is tried again.
        """
        if self._stop.medium_gone:
            self._begin()
        loading = self._loading
        if loading is None:
            return None
        if await ended(loading):
            raise asyncio.CancelledError
        return loading.result()

    async def until_live(self) -> None:
        """Wait until nothing reaches the medium any more, if it has gone, or that has failed.

        The kernel may not have closed the medium yet, for which the removal of the mapping waits.
        """
        if self._stop.medium_gone:
            self._begin()
        if self._live is not None and await ended(self._live):
            raise asyncio.CancelledError

    def mapping_changed(self) -> None:
        """Note that the kernel has changed a mapping: perhaps the table of this one is live now.

        The kernel says so before it closes the medium, which takes about as long as an unmount.
        Source: do_resume in drivers/md/dm-ioctl.c.
        """
        if self._live is None or self._live.done():
            return
        try:
            is_live = self._kernel.has_error_table(self._uuid)
        except (HotplugError, OSError):  # the end of the load says it
            return
        except Exception:  # a defect here must not end the reading of events
            log.exception("look at the mapping: a defect of the agent")
            return
        if is_live:
            self._live.set_result(None)

    async def require(self) -> None:
        """As `done`, of a mapping that may have got its table after the error table was loaded.

        That had found nothing to replace. Raises: HotplugError, OSError if it fails.
        """
        await self.done()
        if self._stop.medium_gone and self.is_mapped:
            self._start()
        failure = await self.done()
        if failure is not None:
            raise failure

    def hold(self) -> None:
        """Load the error table again if somebody has loaded another since. Worker: the volume's.

        An unmount writes what is dirty to wherever the table leads then.
        """
        try:
            if not self._kernel.has_error_table(self._uuid):
                log.warning("%s: its table was changed after it was cut off", self._uuid)
                self._kernel.load_error_table(self._uuid)
        except (HotplugError, OSError) as error:  # as above: it must not stay mounted for that
            log.warning("%s", error)
        except Exception:
            log.exception("hold the error table: a defect of the agent")

    def _begin(self) -> None:
        before = self._loading
        if self.is_mapped and (before is None or (before.done() and before.result() is not None)):
            self._start()

    def _start(self) -> None:
        self._live = asyncio.get_running_loop().create_future()
        self._loading = asyncio.create_task(self._load(self._live))

    async def _load(self, live: asyncio.Future[None]) -> Exception | None:
        try:
            return await self._attempts()
        finally:
            if not live.done():
                live.set_result(None)

    async def _attempts(self) -> Exception | None:
        words = "load the error table"
        worker, late = self._new_worker(), partial(self._late_with, words)
        failure: Exception | None = None
        for _ in range(_TRIES):
            try:
                await worker.run(words, self._kernel.load_error_table, self._uuid, late=late)
            except (HotplugError, OSError) as error:
                log.error("%s", error)
                failure = error
            except Exception as error:  # a defect here must not keep it mounted
                log.exception("%s: a defect of the agent", words)
                failure = error
            else:
                return None
        return failure

    def _late_with(self, words: str, why: str | None) -> None:
        self._late(None if why is None else f"{words}: {why}")
