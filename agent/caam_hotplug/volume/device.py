"""The device of a volume, open from the look at its disk until its table is loaded.

While it is open, its number stands for the same place on the same disk, whose label was read.
"""

from __future__ import annotations

import asyncio
import logging
import math
from dataclasses import replace
from typing import Final

from caam_hotplug.config.match import IN_THE_TABLE, ON_THE_DISK, lacks_entry
from caam_hotplug.config.rules import may_match
from caam_hotplug.errors import HotplugError, ReleaseError
from caam_hotplug.kernel.api import OpenVolume
from caam_hotplug.model import Volume
from caam_hotplug.volume.inbox import Reevaluate
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.record import Record
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.worker import to_the_end

log = logging.getLogger(__name__)

_PAUSE_S: Final = 1.0


class OtherOnDiskError(Exception):
    """The disk says something else of the volume than was reported."""

    def __init__(self, found: Volume) -> None:
        super().__init__(found)
        self.found = found


def _require_same_facts(found: Volume, volume: Volume) -> None:
    if any(getattr(found, fact) != getattr(volume, fact) for fact in ON_THE_DISK):
        raise OtherOnDiskError(found)


def _is_same(found: Volume, volume: Volume) -> bool:
    """Whether the volume is in the place that was opened, with what was read there."""
    facts = (*ON_THE_DISK, "id", "name", "number", "size")
    return all(getattr(found, fact) == getattr(volume, fact) for fact in facts)


def _where_it_says_something(found: Volume, volume: Volume) -> Volume:
    """Return what was found, but for the facts that were not."""
    missing = [fact for fact in ON_THE_DISK if getattr(found, fact) is None]
    return replace(found, **{fact: getattr(volume, fact) for fact in missing})


class Device:
    """The device of one volume, open or not. Synchronization: loop only, but for its steps."""

    def __init__(self, record: Record, operations: Operations) -> None:
        self._record = record
        self._operations = operations
        self._opened: OpenVolume | None = None
        self._followed_at = -math.inf
        """The loop's time when the rules were last matched again for what the disk says."""

    async def identify(self) -> None:
        """Read what the disk says of a volume that udev has not reported, or without its label.

        Raises: KernelError.
        """
        record, read = self._record, None
        while record.volume != read and self._is_to_be_read(record.volume):
            asked = record.volume
            found = await self._operations.call("identify", self._read, asked)
            if record.volume == asked:
                record.read_from_disk(found)
                read = record.volume
            elif not _is_same(found, record.volume):  # as there was a report meanwhile
                await self.close()
        record.stop.check()

    def _is_to_be_read(self, volume: Volume) -> bool:
        rules = self._record.context.rules
        return not volume.identified or (
            lacks_entry(volume) and may_match(rules, volume, IN_THE_TABLE)
        )

    async def confirms(self, target: Target) -> bool:
        """Read again what the disk says, and return whether the target is right by that.

        What cannot be read, or has no entry any more, contradicts nothing.
        """
        record, said = self._record, self._record.volume
        try:
            found = await self._operations.call("identify", self._read, said)
        except (HotplugError, OSError) as error:
            log.warning("%s: %s; it stays as it is", said, error)
            found = target.volume
        finally:
            await self.close()
        record.read_from_disk(_where_it_says_something(found, target.volume))
        return not record.wants_another(target)

    def follow(self, found: Volume) -> None:
        """Have the rules matched again with what the disk says.

        At once; but a disk that says something else each time gets one attempt in a while.
        """
        self._record.read_from_disk(found)
        loop, note = asyncio.get_running_loop(), self._record.inbox.note
        before, self._followed_at = self._followed_at, loop.time()
        if self._followed_at - before > 2 * _PAUSE_S:
            note(Reevaluate.FACTS)
        else:
            loop.call_later(_PAUSE_S, note, Reevaluate.FACTS)

    async def close(self) -> None:
        """Close the device, if it is open; one that cannot be closed now is at the next look."""
        if self._opened is None:
            return
        try:
            await to_the_end(self._operations.call, "close the device", self.close_now)
        except ReleaseError as error:
            log.warning("%s: close the device: %s", self._record.volume, error)

    # Steps of a worker.

    def close_now(self) -> None:
        """Close the device, if it is open. If nothing else has it open, that may block."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened.close()

    def require_read(self, volume: Volume) -> None:
        """Open the device unless it is, and require that its disk says of the volume the same.

        Raises: OtherOnDiskError; KernelError.
        """
        found = self._read(volume) if self._opened is None else self._opened.volume
        _require_same_facts(found, volume)

    def require_not_contradicted(self, volume: Volume) -> None:
        """Require of a volume with a mapping that its disk says nothing else of it.

        Raises: OtherOnDiskError; KernelError.
        """
        _require_same_facts(_where_it_says_something(self._read(volume), volume), volume)

    def require_unused(self) -> None:
        """Raise DeviceInUseError with the users if something else uses the volume."""
        self._open().require_unused()

    def require_same(self) -> None:
        """Require that another medium has not taken its place. Raises: KernelError."""
        self._open().require_same()

    def _open(self) -> OpenVolume:
        if self._opened is None:
            raise HotplugError(f"use {self._record.volume.node}: it is not open")
        return self._opened

    def _read(self, volume: Volume) -> Volume:
        self.close_now()
        self._opened = self._operations.kernel.open_volume(volume)
        return self._opened.volume
