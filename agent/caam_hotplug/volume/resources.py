"""What a volume holds, each as a context: key, mapping, mount.

Three rules hold for all of them. What they are called is derived from the volume and its rule,
never stored. To acquire is to ensure: absent is made, ours is adopted, foreign is refused. To
release is idempotent, checks whose it is, and is arranged before anything is made, so that a
half-made thing is released too.
"""

from __future__ import annotations

import errno
import logging
import signal
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, cast

from caam_hotplug import names
from caam_hotplug.config.rules import OnBusy, Plan
from caam_hotplug.errors import (
    ForeignMappingError,
    MountBusyError,
    MountError,
    MountPointOccupiedError,
    NoFilesystemError,
    VolumeBusyError,
    shown,
)
from caam_hotplug.formats.blobs import KEY_TYPES, Backend
from caam_hotplug.formats.crypt_table import CryptTarget, crypt_target
from caam_hotplug.kernel.api import Kernel
from caam_hotplug.keys import loading
from caam_hotplug.model import KeyReference, Mapping, Mount, Volume, VolumeId
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.worker import to_the_end

log = logging.getLogger(__name__)

SIGNAL_GRACE_S: Final = 5.0
"""How long users of a volume have to end after each signal, where the rule has them ended."""


@dataclass(frozen=True, slots=True)
class Wish:
    """What a volume is to hold: derived from it and the rule that matches it."""

    volume: Volume
    plan: Plan

    @property
    def dm_name(self) -> str:
        return names.dm_name(self.volume.id, self.plan.mount_name)

    @property
    def dm_uuid(self) -> str:
        return names.dm_uuid(self.volume.id)

    @property
    def read_only(self) -> bool:
        return self.volume.read_only or self.plan.rule.mount.read_only


async def release_key(operations: Operations, volume: VolumeId) -> None:
    """The volume's key is in no keyring of the agent's."""
    await operations.call(
        "unlink the key", operations.kernel.unlink_key, names.key_description(volume)
    )


@asynccontextmanager
async def active_mapping(operations: Operations, wish: Wish) -> AsyncIterator[Mapping]:
    """The volume's mapping is live, decrypting with its key.

    Raises: ForeignMappingError if a mapping of its DM-UUID does something else.
    """
    kernel, uuid = operations.kernel, wish.dm_uuid
    existing = await operations.dm("look for the mapping", kernel.find_mapping, uuid)
    adopted = existing is not None and _as_wanted(existing, wish)
    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_mapping, operations, uuid)
        if existing is not None and adopted:
            log.warning(
                "%s: adopting its mapping %s",
                wish.volume,
                existing.name,
                extra=fields("adopted", VOLUME=wish.volume, MAPPING=existing.name),
            )
            _, live = await operations.dm_each(
                ("keep the mapping", partial(kernel.keep_mapping, existing.name)),
                ("look for the mapping", partial(kernel.find_mapping, uuid)),
            )
        else:
            if existing is not None:
                await operations.dm(
                    "remove the half-made mapping", kernel.remove_mapping, existing.name
                )
            live = await _made_mapping(operations, wish)
        operations.stop_signal.check()
        if live is None:
            raise ForeignMappingError(f"mapping {wish.dm_name} vanished while it was made")
        yield live


def _as_wanted(existing: Mapping, wish: Wish) -> bool:
    """Whether a mapping of ours can serve: True. False: it never came to life, make it anew.

    Raises: ForeignMappingError for one that lives and does something else.
    """
    if not existing.table:
        return False
    target = CryptTarget.from_line(existing.table[0])
    if len(existing.table) == 1 and target is not None and _is_wanted(target, wish):
        return True
    raise ForeignMappingError(
        f"mapping {existing.name} is not what rule {wish.plan.rule.name!r} asks for: "
        f"{'; '.join(existing.table)}; remove it, or restore the rule it was made with"
    )


def _is_wanted(target: CryptTarget, wish: Wish) -> bool:
    """Whether the rule asks for this very target, under a key of any type that it allows."""
    rule = wish.plan.rule
    forms = KEY_TYPES.values() if rule.key.form is None else [KEY_TYPES[rule.key.form]]
    return any(
        target.does_the_same(crypt_target(wish.volume, rule.crypt, KeyReference(kind, 0)))
        for kind in forms
        if target.key_description.startswith(f"{kind}:")
    )


async def _made_mapping(operations: Operations, wish: Wish) -> Mapping | None:
    """The mapping, made and live, or None if it has vanished since.

    dm-crypt copies the key when a table is loaded, so it is in the keyring until right after that.
    """
    kernel, plan, name = operations.kernel, wish.plan, wish.dm_name
    description = names.key_description(wish.volume.id)

    def load_key() -> KeyReference:
        blob = kernel.read_blob(plan.blob, plan.rule.key.form)
        return loading.load(kernel, blob, plan.rule.key, description)

    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_key, operations, wish.volume.id)
        _, key = await operations.each(
            ("look who uses it", partial(kernel.require_unused, wish.volume)),
            ("import the blob", load_key),
        )
        operations.stop_signal.check()
        line = crypt_target(wish.volume, plan.rule.crypt, key).to_line()
        read_only = wish.volume.read_only
        *_, live = await operations.dm_each(
            ("create the mapping", partial(kernel.create_mapping, name, wish.dm_uuid)),
            ("load the table", partial(kernel.load_table, name, line, read_only=read_only)),
            ("unlink the key", partial(kernel.unlink_key, description)),
            ("activate the mapping", partial(kernel.activate_mapping, name)),
            ("look for the mapping", partial(kernel.find_mapping, wish.dm_uuid)),
        )
        held.pop_all()  # the key is unlinked already
    return cast("Mapping | None", live)


def backend_that_made(mapping: Mapping) -> Backend:
    """The way in which the key of a live mapping of ours was sealed."""
    target = CryptTarget.from_line(mapping.table[0]) if mapping.table else None
    kind = "" if target is None else target.key_description.partition(":")[0]
    return next((form for form, of_it in KEY_TYPES.items() if of_it == kind), "tagged")


async def release_mapping(operations: Operations, uuid: str) -> None:
    """The mapping is gone; or it is held by others, and then dead if its medium has gone.

    Without a medium nothing waits for holders: an error table takes the crypt table's place,
    which wipes the key in the kernel, and the kernel removes the mapping at its last close.
    """
    if operations.stop_signal.keeps:
        return
    left = await operations.dm("remove the mapping", _removed, operations, uuid)
    if left is not None:
        fate = "without its key" if operations.stop_signal.gone else "with its key"
        log.warning(
            "mapping %s is held open by others; it stays, %s, until they close it",
            left.name,
            fate,
            extra=fields("busy", MAPPING=left.name),
        )


def _removed(operations: Operations, uuid: str) -> Mapping | None:
    """What is left of the mapping, which is to go, because others hold it. Lane: dm."""
    kernel = operations.kernel
    mapping = kernel.find_mapping(uuid)
    if mapping is None:
        return None
    try:
        if mapping.open_count:
            _poison_if_gone(operations, mapping)
    finally:
        kernel.remove_mapping(mapping.name)
    left = kernel.find_mapping(uuid)
    if left is not None:
        _poison_if_gone(operations, left)  # whoever holds it opened it since the first look
    return left


def _poison_if_gone(operations: Operations, mapping: Mapping) -> None:
    """Without a medium, no crypt table and so no key is left in the mapping. Lane: dm."""
    target = CryptTarget.from_line(mapping.table[0]) if mapping.table else None
    if operations.stop_signal.gone and target is not None:
        operations.kernel.poison_mapping(mapping.name, target.length)


@asynccontextmanager
async def mounted(operations: Operations, wish: Wish, mapping: Mapping) -> AsyncIterator[Mount]:
    """The filesystem under the key is mounted at the volume's mount point.

    Raises: NoFilesystemError; MountPointOccupiedError; MountError.
    """
    kernel, name, ask = operations.kernel, wish.plan.mount_name, wish.plan.rule.mount
    there = mounts_at(kernel, name)
    found = _of(mapping, there)
    if there and found is None:
        raise MountPointOccupiedError(f"{there[-1].source} is mounted at {there[-1].point}")

    kind = ""

    def probe() -> None:
        nonlocal kind
        found = kernel.probe(mapping.node, ask.filesystems)
        if found is None:
            raise NoFilesystemError(
                "no known filesystem under this key "
                f"(looked for {', '.join(ask.filesystems)}): "
                f"{kernel.blob_directory / wish.plan.blob} may belong to another medium"
            )
        kind = found

    def mount() -> None:
        kernel.mount(
            mapping.node,
            kind,
            name,
            read_only=wish.read_only,
            options=ask.options,
            filesystem_options=ask.options_for(kind),
        )

    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_mount, operations, name, mapping)
        if mapping.open_count:
            await _release_other_mounts(operations, name, mapping)
        if found is not None:
            log.warning(
                "%s: adopting its mount %s",
                wish.volume,
                found.point,
                extra=fields("adopted", VOLUME=wish.volume, MOUNT_POINT=found.point),
            )
        else:
            await operations.each(("probe", probe), ("mount", mount))
            found = mount_at(kernel, name)
        if found is None:
            raise MountPointOccupiedError(f"{kernel.mount_root / name} was unmounted by others")
        yield found


async def let_go(operations: Operations, wish: Wish, mapping: Mapping, on_busy: OnBusy) -> None:
    """All that was written is on the medium, and nothing of the mapping is mounted or in use.

    Raises: VolumeBusyError if it is in use and the rule leaves it to its users; MountError. All is
    as before then.
    """
    kernel, name = operations.kernel, wish.plan.mount_name
    there = mounts_at(kernel, name)
    found = _of(mapping, there)
    signals = (signal.SIGTERM, signal.SIGKILL) if on_busy is OnBusy.SIGNAL else ()
    if found is None:
        for number in (None, *signals):
            if number is not None:
                await _end_users(operations, wish, mapping, number)
            live = await operations.dm("look for the mapping", kernel.find_mapping, wish.dm_uuid)
            if live is None or not live.open_count or on_busy is OnBusy.DETACH:
                return
        raise await _busy(operations, mapping.node, mapping)
    if there[-1] is not found:
        raise VolumeBusyError(found.point, (f"{shown(there[-1].source)} is mounted over it",))
    if on_busy is OnBusy.REFUSE and _mounted_elsewhere(kernel, mapping):
        raise await _busy(operations, found.point, mapping)  # an unmount here would not tell
    for number in (None, *signals):
        if number is not None:
            await _end_users(operations, wish, mapping, number)
        if not found.read_only:  # each time: what users write as they end is theirs too
            await operations.call("flush", kernel.flush, name, mapping.node)
        with suppress(MountBusyError):
            await operations.call("unmount", kernel.unmount, name)
            return
    if on_busy is not OnBusy.DETACH:
        raise await _busy(operations, found.point, mapping)
    log.warning(
        "%s is in use; detaching it from the tree",
        found.point,
        extra=fields("busy", VOLUME=wish.volume, MOUNT_POINT=found.point),
    )
    await operations.call("detach", kernel.unmount, name, lazily=True)


async def _end_users(
    operations: Operations, wish: Wish, mapping: Mapping, number: signal.Signals
) -> None:
    log.warning(
        "%s: ending its users with %s",
        wish.volume,
        number.name,
        extra=fields("busy", VOLUME=wish.volume, MAPPING=mapping.name),
    )
    await operations.call(
        "end its users", operations.kernel.end_holders, mapping, number, SIGNAL_GRACE_S
    )


def _mounted_elsewhere(kernel: Kernel, mapping: Mapping) -> list[str]:
    """Where others have mounted it, outside the mount root."""
    points = (mount.point for mount in kernel.mounts() if is_of(mount, mapping))
    return [point for point in points if Path(point).parent != kernel.mount_root]


async def _busy(operations: Operations, what: str, mapping: Mapping) -> VolumeBusyError:
    return VolumeBusyError(what, await who_uses(operations, mapping))


async def who_uses(operations: Operations, mapping: Mapping) -> tuple[str, ...]:
    """Processes that use the mapping's filesystem, and places where it is mounted by others."""
    kernel = operations.kernel
    holders = await operations.call("look who uses it", kernel.holders, mapping)
    points = _mounted_elsewhere(kernel, mapping)
    return (*map(str, holders), *(f"it is mounted at {shown(point)}" for point in points))


async def release_mount(operations: Operations, name: str, mapping: Mapping) -> None:
    """Nothing of the mapping is mounted at the mount point, and the directory is gone.

    A mount in use is detached: whoever is inside may finish there, nobody new gets in. With a
    medium, everything written so far is on it first. Raises: MountError if it is still there.
    """
    kernel = operations.kernel
    if operations.stop_signal.keeps:
        return
    there = mounts_at(kernel, name)
    found = _of(mapping, there)
    if found is None:
        await operations.call("remove the mount point", kernel.remove_mount_point, name)
        return
    try:
        await _uncover(operations, name, mapping, there)
        if not operations.stop_signal.gone and not found.read_only:
            await operations.call("flush", kernel.flush, name, mapping.node)
    finally:
        await _unmount_or_detach(operations, name, mapping)


async def _uncover(
    operations: Operations, name: str, mapping: Mapping, there: Sequence[Mount]
) -> None:
    """What others have mounted over ours is detached; ours would be out of reach."""
    for cover in reversed(there):
        if is_of(cover, mapping):
            return
        log.warning("%s is mounted over %s; detaching it", shown(cover.source), cover.point)
        await operations.call("detach", operations.kernel.unmount, name, lazily=True)


async def _unmount_or_detach(operations: Operations, name: str, mapping: Mapping) -> None:
    kernel = operations.kernel

    def unmount() -> MountError | None:
        try:
            kernel.unmount(name)
        except MountError as error:
            return error
        kernel.remove_mount_point(name)
        return None

    refusal = await operations.call("unmount", unmount)
    if refusal is not None:
        said = fields("busy", MOUNT_POINT=name)
        log.warning("%s; detaching it from the tree", refusal, extra=said)
        try:
            await operations.call("detach", kernel.unmount, name, lazily=True)
        finally:
            await operations.call("remove the mount point", kernel.remove_mount_point, name)
    if (left := _of(mapping, mounts_at(kernel, name))) is not None:
        raise MountError("unmount", left.point, errno.EBUSY, "something is mounted over it")


async def _release_other_mounts(operations: Operations, name: str, mapping: Mapping) -> None:
    """An earlier run had other rules, and may have mounted the volume under another name."""
    for other in mounts_of(operations.kernel, mapping):
        if other != name:
            await release_mount(operations, other, mapping)


# The table of mounts is read on the loop, not on a lane: it lies in memory, and the lock it is
# read under (namespace_sem, fs/namespace.c) is never held over I/O, so it cannot hang as a mount
# or an unmount can. It can fail, such as for want of a file descriptor.


def mounts_of(kernel: Kernel, mapping: Mapping) -> dict[str, Mount]:
    """The mapping's mounts in the mount root, by their names there."""
    found = ((Path(mount.point), mount) for mount in kernel.mounts() if is_of(mount, mapping))
    return {point.name: mount for point, mount in found if point.parent == kernel.mount_root}


def mount_at(kernel: Kernel, name: str) -> Mount | None:
    """The topmost mount at a name in the mount root, or None."""
    return next(reversed(mounts_at(kernel, name)), None)


def mounts_at(kernel: Kernel, name: str) -> list[Mount]:
    """All mounts at a name in the mount root, the topmost last."""
    point = str(kernel.mount_root / name)
    return [mount for mount in kernel.mounts() if mount.point == point]


def _of(mapping: Mapping, mounts: Iterable[Mount]) -> Mount | None:
    """The one of them that shows the mapping, or None."""
    return next((mount for mount in mounts if is_of(mount, mapping)), None)


def is_of(mount: Mount, mapping: Mapping) -> bool:
    """Whether the mount shows the mapping; btrfs gives its mounts a device number of their own."""
    names_of_it = {mapping.node, f"/dev/mapper/{mapping.name}"}
    return mount.number == mapping.number or mount.source in names_of_it
