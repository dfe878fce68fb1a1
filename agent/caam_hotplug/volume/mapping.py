"""The mapping of a volume as a context: made or adopted, and released."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import cast

from caam_hotplug import names
from caam_hotplug.errors import ForeignMappingError
from caam_hotplug.formats.blobs import KEY_TYPES, Backend
from caam_hotplug.formats.crypt_table import CryptTarget, crypt_target
from caam_hotplug.keys import backends
from caam_hotplug.model import KeyReference, Mapping, Volume, VolumeId
from caam_hotplug.volume.adoption import leading_to, may_be_adopted
from caam_hotplug.volume.device import Device
from caam_hotplug.volume.mount_table import first_of, mounts_at, mounts_of
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.release import suspended
from caam_hotplug.volume.stop_signal import Reason
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.worker import to_the_end

log = logging.getLogger(__name__)

Watch = Callable[[Mapping], object]

# To acquire is to ensure: an absent mapping is made, ours is adopted, a foreign one refused. To
# release is idempotent, checks the DM-UUID, and is arranged before anything is made, so that a
# half-made mapping is released too.


async def release_key(operations: Operations, volume: VolumeId) -> None:
    """Unlink the volume's key from the agent's keyring."""
    await operations.call(
        "unlink the key", operations.kernel.unlink_key, names.key_description(volume)
    )


@asynccontextmanager
async def active_mapping(
    operations: Operations, device: Device, target: Target, watch: Watch, *, is_read: bool
) -> AsyncIterator[Mapping]:
    """Make or adopt the mapping of the target, and release it on the way out.

    The mapping holds the device, which is closed then without waiting for the medium.
    `watch`: has changes of a mapping noticed; `is_read`: whether it is to be mounted.
    Raises: OtherOnDiskError if its disk says something else; ForeignMappingError if a mapping of
    its DM-UUID does something else; SuspendedError if it is, and would be read.
    """
    kernel, uuid = operations.kernel, target.dm_uuid
    operations.cut_off.is_mapped = True
    existing, adopted = await _existing(operations, target, watch)
    if existing is not None and existing.name != target.dm_name:  # made by another label or rule
        await operations.call("identify", device.require_not_contradicted, target.volume)
    if existing is not None and adopted and existing.is_suspended and is_read:
        await _require_running(operations, existing, target.plan.place, watch)
    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_mapping, operations, uuid)
        if existing is not None and adopted:
            live = await _adopt(operations, device, target, existing, watch)
            is_same = live is not None and live.table == existing.table
        else:
            if existing is not None:
                await operations.dm(
                    "remove the half-made mapping", kernel.remove_mapping, existing.name
                )
            live = await _make_mapping(operations, device, target)
            is_same = live is not None and _leads_there(live, target)
        operations.stop.check()
        if live is None:
            raise ForeignMappingError(f"mapping {target.dm_name} vanished while it was made")
        if not is_same:
            await cut_off_changed(operations, target.volume, live)
            operations.stop.check()
        yield live


async def _existing(
    operations: Operations, target: Target, watch: Watch
) -> tuple[Mapping | None, bool]:
    """Return the mapping that there is, and whether it may be adopted.

    Raises: ForeignMappingError if it does something else; each change since is noticed.
    """
    look, uuid = operations.kernel.find_mapping, target.dm_uuid
    existing = await operations.dm("look for the mapping", look, uuid)
    if existing is None:
        return None, False
    try:
        return existing, may_be_adopted(existing, target)
    except ForeignMappingError:
        watch(existing)
    existing = await operations.dm("look for the mapping", look, uuid)
    return existing, existing is not None and may_be_adopted(existing, target)


async def _adopt(
    operations: Operations, device: Device, target: Target, existing: Mapping, watch: Watch
) -> Mapping | None:
    """Keep the mapping, and return it as it is then; each change since is noticed."""
    kernel = operations.kernel
    extra = fields("adopted", VOLUME=target.volume, MAPPING=existing.name)
    log.warning("%s: adopting its mapping %s", target.volume, existing.name, extra=extra)
    watch(existing)
    *_, live = await operations.dm_each(
        ("keep the mapping", partial(kernel.keep_mapping, existing.name)),
        ("close the device", device.close_now),
        ("look for the mapping", partial(kernel.find_mapping, target.dm_uuid)),
    )
    return cast("Mapping | None", live)


def _leads_there(live: Mapping, target: Target) -> bool:
    return leading_to(live, target.volume, target.plan.rule) is not None


async def cut_off_changed(operations: Operations, volume: Volume, live: Mapping) -> None:
    """Stop all I/O of a mapping whose table somebody has changed, and end the lifecycle."""
    has = "; ".join(live.table) or "no table"
    log.error("%s: mapping %s has been changed: %s", volume, live.name, has)
    operations.stop.set(Reason.OTHER_TABLE)
    await operations.cut_off.done()


async def _require_running(
    operations: Operations, existing: Mapping, place: str, watch: Watch
) -> None:
    """Raise SuspendedError unless it was resumed since, or is mounted at its place alone.

    A flush of another mount of it would wait, and so would a read to find its filesystem.

    It is left as it is, since somebody has a reason for that. Its resume is noticed from now on.
    """
    kernel = operations.kernel
    is_seen = first_of(existing, mounts_at(kernel, place)) is not None
    if is_seen and set(mounts_of(kernel, existing)) == {place}:
        return
    watch(existing)
    look, uuid = kernel.find_mapping, existing.uuid
    live = await operations.dm("look for the mapping", look, uuid)
    if live is not None and live.is_suspended:
        raise suspended(live)


async def _make_mapping(operations: Operations, device: Device, target: Target) -> Mapping | None:
    """Make the mapping, and return it, or None if somebody has removed it since.

    What has chosen it is on the disk, and not only reported: else OtherOnDiskError is raised.
    The table refers to the device by its number, under which there may be another medium since it
    was opened. That is known once the table is loaded, before anything can be read through it.

    dm-crypt copies the key when a table is loaded, so it is in the keyring until right after that.
    """
    kernel, plan, name = operations.kernel, target.plan, target.dm_name
    description = names.key_description(target.volume.id)

    def load_key() -> KeyReference:
        blob = kernel.read_blob(plan.blob, plan.rule.key.form)
        return backends.load(kernel, blob, plan.rule.key, description)

    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_key, operations, target.volume.id)
        *_, key = await operations.each(
            ("identify", partial(device.require_read, target.volume)),
            ("look who uses it", device.require_unused),
            ("import the blob", load_key),
        )
        operations.stop.check()
        line = crypt_target(target.volume, plan.rule.crypt, key).to_line()
        read_only = target.volume.read_only
        *_, live = await operations.dm_each(
            ("create the mapping", partial(kernel.create_mapping, name, target.dm_uuid)),
            ("load the table", partial(kernel.load_table, name, line, read_only=read_only)),
            ("unlink the key", partial(kernel.unlink_key, description)),
            ("look whether it is the same medium", device.require_same),
            ("close the device", device.close_now),
            ("activate the mapping", partial(kernel.activate_mapping, name)),
            ("look for the mapping", partial(kernel.find_mapping, target.dm_uuid)),
        )
        held.pop_all()  # the key is unlinked already
    return cast("Mapping | None", live)


def backend_that_made(mapping: Mapping) -> Backend:
    """Return the kind of key that our mapping decrypts with."""
    crypt = CryptTarget.from_line(mapping.table[0]) if mapping.table else None
    kind = "" if crypt is None else crypt.key_description.partition(":")[0]
    return next((form for form, of_it in KEY_TYPES.items() if of_it == kind), "tagged")


async def release_mapping(operations: Operations, uuid: str) -> None:
    """Remove the mapping, or have the kernel remove it when its last holder closes it.

    Without a medium nothing waits for holders: an error table has replaced the crypt table, which
    wipes the key in the kernel (crypt_dtr, drivers/md/dm-crypt.c).
    """
    if operations.stop.keeps:
        return
    await operations.cut_off.done()
    left = await operations.dm("remove the mapping", _remove, operations, uuid)
    operations.cut_off.is_mapped = left is not None
    if left is not None:
        await operations.cut_off.require()
        fate = "without its key" if operations.stop.medium_gone else "with its key"
        log.warning(
            "mapping %s is held open by others; it stays, %s, until they close it",
            left.name,
            fate,
            extra=fields("busy", MAPPING=left.name),
        )


def _remove(operations: Operations, uuid: str) -> Mapping | None:
    """Remove the mapping, and return what is left of it because others hold it. Worker: dm."""
    kernel = operations.kernel
    mapping = kernel.find_mapping(uuid)
    if mapping is None:
        return None
    kernel.remove_mapping(mapping.name)
    return kernel.find_mapping(uuid)
