"""Fakes of the status registry and of the agent behind the service."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from caam_hotplug.errors import HotplugError
from caam_hotplug.model import Entry, State, Volume, VolumeId
from unit.volumes import STICK


class FakeRegistry:
    """A status registry that publishes what a test passes."""

    def __init__(self) -> None:
        self.counters: Counter[str] = Counter()
        self._entries: dict[VolumeId, Entry] = {}
        self._listeners: list[Callable[[Entry], None]] = []

    def entries(self) -> list[Entry]:
        return list(self._entries.values())

    def entry(self, which: VolumeId) -> Entry | None:
        return self._entries.get(which)

    def listen(self, listener: Callable[[Entry], None]) -> None:
        self._listeners.append(listener)

    def publish(self, volume: Volume, state: State, reason: str = "", **more: Any) -> Entry:
        """Publish the status of the volume."""
        entry = Entry(volume, state, reason, **more)
        self.counters[state.value] += 1
        if state is State.GONE:
            self._entries.pop(volume.id, None)
        else:
            self._entries[volume.id] = entry
        for listener in self._listeners:
            listener(entry)
        return entry

    def forget(self, volume: Volume) -> None:
        """Remove the volume without calling a listener."""
        del self._entries[volume.id]


class FakeAgent:
    """An agent that carries out requests, or what a test sets in their place."""

    def __init__(self, registry: FakeRegistry) -> None:
        self.registry = registry
        self.asked: list[tuple[Any, ...]] = []
        self.instead: Callable[[], Any] | None = None
        """Called in place of the next request; an awaitable is awaited."""
        self.notices: list[str] = []
        self.looks: list[VolumeId] = []
        self.look_finds: Callable[[], Any] = lambda: None
        self.thread: threading.Thread | None = None
        """The thread of the last explanation."""

    async def _do(self, *what: Any) -> bool:
        """Record the request, and return whether it is still to be carried out."""
        self.asked.append(what)
        if self.instead is None:
            return True
        instead, self.instead = self.instead, None
        done = instead()
        if asyncio.isfuture(done) or asyncio.iscoroutine(done):
            await done
        return False

    def _entry(self, volume: VolumeId) -> Entry:
        return next(entry for entry in self.registry.entries() if entry.volume.id == volume)

    async def lock(self, volume: VolumeId, by: str) -> None:
        if await self._do("lock", volume, by):
            self.registry.publish(self._entry(volume).volume, State.LOCKED, "asked for")

    async def eject(self, volume: VolumeId, by: str, *, power_off: bool = True) -> str:
        if await self._do("eject", volume, by, power_off):
            self.registry.publish(self._entry(volume).volume, State.EJECTED, "asked for")
        return f"{self._entry(volume).volume.partlabel}: safe to remove"

    async def unlock(self, volume: VolumeId, by: str, *, mounts: bool = True) -> None:
        if not await self._do("unlock" if mounts else "unlock without a mount", volume, by):
            return
        if mounts:
            mounted(self.registry, self._entry(volume).volume)
        else:
            node = "/dev/dm-0"
            volume_now = self._entry(volume).volume
            self.registry.publish(volume_now, State.UNLOCKED, "as caam-x", mapping_node=node)

    async def retry(self, volume: VolumeId, by: str) -> None:
        if await self._do("retry", volume, by):
            mounted(self.registry, self._entry(volume).volume)

    async def reload(self, by: str) -> list[str]:
        await self._do("reload", by)
        return self.notices

    def look(self, volume: VolumeId) -> None:
        self.looks.append(volume)
        self.look_finds()

    def explain(self, device: str) -> str:
        self.asked.append(("explain", device))
        self.thread = threading.current_thread()
        if self.instead is not None:
            self.instead, instead = None, self.instead
            instead()
        return f"{device}: a device\n  rule 'a': no"


def mounted(registry: FakeRegistry, volume: Volume = STICK, **more: Any) -> Entry:
    """Publish the volume as mounted."""
    return registry.publish(
        volume,
        State.MOUNTED,
        f"at /run/media/{volume.partlabel}, read-write",
        rule="sticks",
        mount_point=f"/run/media/{volume.partlabel}",
        mapping_node="/dev/dm-0",
        mapping_name=f"caam-{volume.partlabel}-{volume.id}",
        filesystem="ext4",
        since=1_700_000_000.25,
        steps={"import the blob": 0.5, "mount": 0.25},
        **more,
    )


def again(**changes: Any) -> Volume:
    """Return the same volume with other facts."""
    return replace(STICK, **changes)


def raising(error: BaseException) -> Callable[[], None]:
    """Return a function for `FakeAgent.instead` that raises the error."""

    def fail() -> None:
        raise error

    return fail


class StrangeError(HotplugError):
    """An error without a D-Bus name."""
