"""Release of a mounted volume on request, according to its rule's `on_busy`."""

from __future__ import annotations

import logging
import signal
from contextlib import suppress
from typing import Final

from caam_hotplug.config.rules import OnBusy
from caam_hotplug.errors import (
    MountBusyError,
    SuspendedError,
    VolumeBusyError,
    WritesLostError,
    shown,
)
from caam_hotplug.kernel.mount_places import Mounts
from caam_hotplug.model import DeviceNumber, Mapping
from caam_hotplug.volume.mount_table import (
    first_of,
    mounted_elsewhere,
    mounts_among,
    point_of,
    points_of,
    with_copies,
)
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.writes import Writes

log = logging.getLogger(__name__)

SIGNAL_GRACE_S: Final = 5.0
"""How long users of a volume have to end after each signal, where the rule has them ended."""


async def release(
    operations: Operations,
    target: Target,
    mapping: Mapping,
    writes: Writes,
    on_busy: OnBusy,
    *,
    anyway: bool,
) -> None:
    """Flush and unmount the volume, so that nothing of the mapping is mounted or in use.

    `anyway`: also if something could not be written.
    Raises: VolumeBusyError if it is in use and the rule leaves it to its users; WritesLostError;
    MountError. Then nothing has changed.
    """
    kernel, place = operations.kernel, target.plan.place
    there = mounts_among(mounts := kernel.mounts(), point_of(kernel, place), mapping)
    found = first_of(mapping, there)
    if found is None:
        await _release_unmounted(operations, target, mapping, writes, on_busy)
        if not anyway and writes.lost:
            raise WritesLostError(writes.lost)
        return
    if there[-1] is not found:
        raise VolumeBusyError(found.point, (f"{shown(there[-1].source)} is mounted over it",))
    if on_busy is OnBusy.REFUSE and mounted_elsewhere(kernel, mapping):
        raise await _busy(operations, found.point, mapping)  # an unmount here would not notice

    which = with_copies(mounts, found)
    for number in (None, *_signals(on_busy)):
        if number is not None:
            await _end_holders(operations, target, mapping, number)
        with suppress(MountBusyError):
            await _unmount(operations, place, which, mapping, writes, anyway=anyway)
            return
    if on_busy is not OnBusy.DETACH:
        raise await _busy(operations, found.point, mapping)
    said = fields("busy", VOLUME=target.volume, MOUNT_POINT=found.point)
    log.warning("%s is in use; detaching it from the tree", found.point, extra=said)
    await operations.call("detach", kernel.unmount, place, which, lazily=True)


async def _unmount(
    operations: Operations,
    place: str,
    which: Mounts,
    mapping: Mapping,
    writes: Writes,
    *,
    anyway: bool,
) -> None:
    """Flush and unmount it: each time, since users may write as they end."""

    def unmount() -> None:
        operations.require_medium()
        writes.watch = writes.watch or operations.kernel.watch_writes(mapping)
        writes.watch.unmount(place, which, anyway=anyway, before=operations.require_medium)

    try:
        await operations.call("unmount", unmount)
    finally:
        writes.note()


def _signals(on_busy: OnBusy) -> tuple[signal.Signals, ...]:
    return (signal.SIGTERM, signal.SIGKILL) if on_busy is OnBusy.SIGNAL else ()


def suspended(mapping: Mapping) -> SuspendedError:
    """Return the refusal to release a mapping that is suspended.

    A resume makes a table live that was loaded meanwhile, which nothing reports, and what waits is
    written by that. `clear` drops it, and does nothing where there is none.
    """
    name = mapping.name
    cure = f"`dmsetup clear {name} && dmsetup resume {name}` ends that"
    return SuspendedError(f"mapping {name} is suspended, and writes wait; {cure}")


async def _release_unmounted(
    operations: Operations, target: Target, mapping: Mapping, writes: Writes, on_busy: OnBusy
) -> None:
    """Wait for the users of a mapping that is not mounted here. Raises: VolumeBusyError."""
    kernel = operations.kernel
    for number in (None, *_signals(on_busy)):
        if number is not None:
            await _end_holders(operations, target, mapping, number)
        live = await operations.dm("look for the mapping", kernel.find_mapping, target.dm_uuid)
        is_free = live is None or live.open_count <= writes.holds
        if is_free or on_busy is OnBusy.DETACH:
            break
    else:
        raise await _busy(operations, mapping.node, mapping)
    if writes.watch is not None:
        await operations.call("flush", writes.watch.check)
        writes.note()


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


async def who_uses(
    operations: Operations,
    mapping: Mapping,
    *,
    is_released: bool = False,
    also: DeviceNumber | None = None,
) -> tuple[str, ...]:
    """Return the processes that use the filesystem, and where others have mounted it.

    `is_released`: whether no mount of it is the agent's; `also`: the number that its mount had.
    """
    kernel = operations.kernel
    holders = await operations.call("look who uses it", kernel.holders, mapping, also)
    points = (points_of if is_released else mounted_elsewhere)(kernel, mapping)
    return (*map(str, holders), *(f"it is mounted at {shown(point)}" for point in points))
