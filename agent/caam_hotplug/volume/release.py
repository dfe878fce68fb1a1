"""Release of a mounted volume on request, according to its rule's `on_busy`."""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from typing import Final

from caam_hotplug.config.rules import OnBusy
from caam_hotplug.errors import MountBusyError, VolumeBusyError, shown
from caam_hotplug.model import Mapping
from caam_hotplug.volume.mount_table import first_of, mounted_elsewhere, mounts_at
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.target import Target

log = logging.getLogger(__name__)

SIGNAL_GRACE_S: Final = 5.0
"""How long users of a volume have to end after each signal, where the rule has them ended."""


async def release(
    operations: Operations, target: Target, mapping: Mapping, on_busy: OnBusy
) -> None:
    """Flush and unmount the volume, so that nothing of the mapping is mounted or in use.

    Raises: VolumeBusyError if it is in use and the rule leaves it to its users; MountError. Then
    nothing has changed.
    """
    kernel, name = operations.kernel, target.plan.mount_name
    there = mounts_at(kernel, name)
    found = first_of(mapping, there)
    signals = (signal.SIGTERM, signal.SIGKILL) if on_busy is OnBusy.SIGNAL else ()
    if found is None:
        for number in (None, *signals):
            if number is not None:
                await _end_holders(operations, target, mapping, number)
            live = await operations.dm("look for the mapping", kernel.find_mapping, target.dm_uuid)
            if live is None or not live.open_count or on_busy is OnBusy.DETACH:
                return
        raise await _busy(operations, mapping.node, mapping)
    if there[-1] is not found:
        raise VolumeBusyError(found.point, (f"{shown(there[-1].source)} is mounted over it",))
    if on_busy is OnBusy.REFUSE and mounted_elsewhere(kernel, mapping):
        raise await _busy(operations, found.point, mapping)  # an unmount here would not notice
    for number in (None, *signals):
        if number is not None:
            await _end_holders(operations, target, mapping, number)
        if not found.read_only:  # each time: users may write as they end
            await operations.call("flush", kernel.flush, name, mapping.node)
        with suppress(MountBusyError):
            await operations.call("unmount", kernel.unmount, name)
            return
    if on_busy is not OnBusy.DETACH:
        raise await _busy(operations, found.point, mapping)
    log.warning(
        "%s is in use; detaching it from the tree",
        found.point,
        extra=fields("busy", VOLUME=target.volume, MOUNT_POINT=found.point),
    )
    await operations.call("detach", kernel.unmount, name, lazily=True)


async def _end_holders(
    operations: Operations, target: Target, mapping: Mapping, number: signal.Signals
) -> None:
    log.warning(
        "%s: ending its users with %s",
        target.volume,
        number.name,
        extra=fields("busy", VOLUME=target.volume, MAPPING=mapping.name),
    )
    await operations.call(
        "end its users", operations.kernel.end_holders, mapping, number, SIGNAL_GRACE_S
    )


async def _busy(operations: Operations, what: str, mapping: Mapping) -> VolumeBusyError:
    return VolumeBusyError(what, await who_uses(operations, mapping))


async def who_uses(operations: Operations, mapping: Mapping) -> tuple[str, ...]:
    """Return the processes that use the filesystem, and where others have mounted it."""
    kernel = operations.kernel
    holders = await operations.call("look who uses it", kernel.holders, mapping)
    points = mounted_elsewhere(kernel, mapping)
    return (*map(str, holders), *(f"it is mounted at {shown(point)}" for point in points))
