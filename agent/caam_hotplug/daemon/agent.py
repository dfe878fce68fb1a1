"""Requests for the agent as a whole: reload and explain."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from caam_hotplug.config.loader import Config
from caam_hotplug.daemon import explain
from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import ConfigError, HotplugError, shown
from caam_hotplug.kernel.abandonable import run_in_thread
from caam_hotplug.model import Entry, VolumeId
from caam_hotplug.systemd import journal
from caam_hotplug.systemd.notify import Notifier

log = logging.getLogger(__name__)

_READ_AT_START = (
    "source", "await_udev", "blob_directory", "mount_root", "stuck_after_s", "stop_within_s",
)  # fmt: skip
"""Keys of the configuration that take effect at the next start only."""

_READ_WITHIN_S: Final = 30.0
"""A file may be on a filesystem that hangs."""
_ANSWERS_WITHIN_S: Final = 30.0
"""How long an explanation waits for the loop, which may be ending."""

Load = Callable[[], Config]


class Agent:
    """The agent as the service manager and D-Bus clients address it. Synchronization: loop only."""

    def __init__(
        self,
        config: Config,
        load: Load,
        supervisor: Supervisor,
        notifier: Notifier,
        registry: StatusRegistry,
    ) -> None:
        """`load` reads the configuration files."""
        self._loop = asyncio.get_running_loop()
        self._registry = registry
        self._config = config
        self._load = load
        self._supervisor = supervisor
        self._notifier = notifier
        self._reloading: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()

    def reload_soon(self) -> None:
        """Reload on a signal; only the journal has the outcome."""

        async def work() -> None:
            with suppress(HotplugError):
                await self.reload("SIGHUP")

        task = asyncio.create_task(work())
        self._reloading.add(task)
        task.add_done_callback(self._reloading.discard)

    async def reload(self, by: str) -> list[str]:
        """Put the rules of the files in force, also for present media.

        Returns: notices of other changes, which take effect at the next start.
        Raises: ConfigError naming every fault, HotplugError if a file cannot be read in time; the
            earlier rules stay in force.
        """
        event = journal.Event
        asked = journal.event(event.REQUESTED, request="reload", requested_by=by)
        log.info("reload asked for by %s", shown(by), extra=asked)
        async with self._turn:  # or an older reading of the files could come into force last
            return await self._reload()

    async def _reload(self) -> list[str]:
        event = journal.Event
        self._notifier.send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        try:
            # Not the loop's own threads: it waits for them when it ends.
            config = await run_in_thread("read the configuration", self._load, _READ_WITHIN_S)
            self._supervisor.reevaluate(config.rule)
        except ConfigError as error:
            for fault in error.faults:
                log.error("%s", fault, extra=journal.event(event.CONFIG_REFUSED, reason=fault))
            refused = journal.event(event.CONFIG_REFUSED)
            log.error("the configuration is refused; the rules before stay in force", extra=refused)
            raise
        except HotplugError as error:
            refused = journal.event(event.CONFIG_REFUSED, reason=str(error))
            log.error("reload: %s; the rules before stay in force", error, extra=refused)
            raise
        finally:
            self._notifier.send("READY=1")
        logging.getLogger("caam_hotplug").setLevel(config.log_level.upper())
        log.info("reloaded: %d rules", len(config.rule), extra=journal.event(event.RELOADED))
        notices = [
            f"{key} was changed and takes effect at the next start"
            for key in _READ_AT_START
            if getattr(config, key) != getattr(self._config, key)
        ]
        for notice in notices:
            log.warning("%s", notice)
        return notices

    def look(self, volume: VolumeId) -> None:
        """Have the volume looked at: at most once a second."""
        self._supervisor.observer.look(volume)

    def explain(self, device: str) -> str:
        """As `caam-hotplug explain`, under the files' rules. Raises: HotplugError. Any thread."""

        async def published() -> list[Entry]:
            for entry in self._registry.entries():
                self.look(entry.volume.id)
            return self._registry.entries()

        asked = asyncio.run_coroutine_threadsafe(published(), self._loop)
        lines = explain.explain(device, self._load(), asked.result(_ANSWERS_WITHIN_S))
        return "\n".join(lines)
