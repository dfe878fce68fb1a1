"""The mount of a volume as a context: made or adopted, and released."""

from __future__ import annotations

import errno
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

from caam_hotplug.errors import (
    FlushError,
    HotplugError,
    KernelError,
    MediumGoneError,
    MountError,
    MountPointOccupiedError,
    NoFilesystemError,
    WritesLostError,
    shown,
)
from caam_hotplug.formats.mount_options import may_lack_replay, without_replay
from caam_hotplug.kernel.mount_places import Mounts
from caam_hotplug.model import Mapping, Mount
from caam_hotplug.names import is_path
from caam_hotplug.volume.mount_table import (
    first_of,
    mounts_among,
    mounts_at,
    places_of,
    point_of,
    with_copies,
)
from caam_hotplug.volume.nesting import why_nested
from caam_hotplug.volume.operations import Operations, fields
from caam_hotplug.volume.target import Target
from caam_hotplug.volume.worker import to_the_end
from caam_hotplug.volume.writes import Writes

log = logging.getLogger(__name__)


@asynccontextmanager
async def mounted(
    operations: Operations, target: Target, mapping: Mapping, writes: Writes
) -> AsyncIterator[Mount]:
    """Mount or adopt the filesystem of the mapping, and release the mount on the way out.

    Raises: NoFilesystemError; MountPointOccupiedError; MountError.
    """
    kernel, place = operations.kernel, target.plan.place
    there = mounts_among(mounts := kernel.mounts(), point_of(kernel, place))
    found = first_of(mapping, there)
    if there and found is None:
        raise MountPointOccupiedError(f"{there[-1].source} is mounted at {there[-1].point}")
    if found is None and (words := await why_nested(operations, target, mounts)):
        raise MountPointOccupiedError(words)

    def watch() -> None:
        writes.watch = kernel.watch_writes(mapping)

    async with AsyncExitStack() as held:
        held.push_async_callback(to_the_end, release_mount, operations, place, mapping, writes)
        for other in places_of(kernel, mapping):  # an earlier run may have had other rules
            if other != place:
                await release_mount(operations, other, mapping)
        if found is not None:
            if is_path(place):  # others may have made it
                kernel.note_place(mapping, place)
            extra = fields("adopted", VOLUME=target.volume, MOUNT_POINT=found.point)
            log.warning("%s: adopting its mount %s", target.volume, found.point, extra=extra)
            await _watch_adopted(operations, watch, partial(kernel.keep_place, place))
        else:
            await _mount(operations, target, mapping, watch, writes)
            found = first_of(mapping, mounts_at(kernel, place, mapping))
        if found is None:
            raise MountPointOccupiedError(f"{kernel.mount_root / place} was unmounted by others")
        yield found


async def _watch_adopted(
    operations: Operations, watch: Callable[[], None], keep_place: Callable[[], None]
) -> None:
    """Watch a mount that is in use, if that can be done; else at its release."""
    try:
        await operations.each(("watch its writes", watch), ("keep its place", keep_place))
    except (HotplugError, OSError) as error:
        log.warning("%s", error)


async def _mount(
    operations: Operations,
    target: Target,
    mapping: Mapping,
    watch: Callable[[], None],
    writes: Writes,
) -> None:
    kernel, asked = operations.kernel, target.plan.rule.mount
    filesystem = ""

    def probe() -> None:
        nonlocal filesystem
        found = kernel.probe(mapping.node, asked.filesystems)
        if found is None:
            raise NoFilesystemError(
                "no known filesystem under this key "
                f"(looked for {', '.join(asked.filesystems)}): "
                f"{kernel.blob_directory / target.plan.blob} may belong to another medium"
            )
        filesystem = found
        watch()

    def mount() -> MountError | None:
        attach = partial(
            kernel.mount,
            mapping.node,
            filesystem,
            target.plan.place,
            read_only=target.read_only,
            options=asked.options,
        )
        return _attached(attach, target, filesystem)

    _, refusal = await operations.each(("probe", probe), ("mount", mount))
    if refusal is not None:
        words = "it is write-protected, so it is mounted without the changes that its journal has"
        cure = "They are kept: mounted writable once, it shows them"
        log.warning("%s: %s; %s. %s", target.volume, refusal, words, cure)
    if writes.watch is not None:
        writes.watch.mounted()


def _attached(attach: Callable[..., None], target: Target, filesystem: str) -> MountError | None:
    """Mount it; if its journal cannot be written back, without that. Return why, if so.

    Raises: MountError. Worker: the volume's.
    """
    options = target.plan.rule.mount.options_for(filesystem)
    try:
        attach(filesystem_options=options)
    except MountError as error:
        if not target.volume.read_only or not may_lack_replay(filesystem, error.errno):
            raise
        try:
            attach(filesystem_options=without_replay(filesystem, options))
        except MountError as second:
            operation = f"{second.operation} without its journal"
            number, words = second.errno or errno.EIO, second.detail
            raise MountError(operation, second.subject, number, words) from error
        return error
    return None


async def release_mount(
    operations: Operations, place: str, mapping: Mapping, writes: Writes | None = None
) -> None:
    """Unmount the mapping from the mount point, and remove the directory.

    A mount in use is detached: its users may finish there, and nobody new gets in. If the medium
    is there, everything written so far is flushed first. Raises: MountError if it is still there;
    WritesLostError.
    """
    writes = writes or Writes()
    known = writes.lost
    try:
        if not operations.stop.keeps:
            await _release(operations, place, mapping, writes)
            if place == operations.kernel.place_of(mapping):  # a later mount there is others'
                operations.kernel.note_place(mapping, "")
    finally:
        if writes.watch is not None:
            await operations.call("end the watch", writes.close)
    if writes.lost != known and not operations.stop.medium_gone:
        raise WritesLostError(writes.lost)


async def _release(operations: Operations, place: str, mapping: Mapping, writes: Writes) -> None:
    kernel = operations.kernel
    mounts = kernel.mounts()
    there = mounts_among(mounts, point_of(kernel, place), mapping)
    found = first_of(mapping, there)

    writes.was_writable = found is not None and not found.is_filesystem_read_only

    def remove_mount_point() -> None:
        writes.close()
        kernel.remove_mount_point(place)

    if found is None:
        await operations.call("remove the mount point", remove_mount_point)
        return
    which = with_copies(mounts, found)
    try:
        await _uncover(operations, place, found, there)
    finally:
        await _unmount_or_detach(operations, place, which, mapping, writes)


async def _uncover(
    operations: Operations, place: str, found: Mount, there: Sequence[Mount]
) -> None:
    """Detach mounts of others that cover ours; it could not be unmounted below them."""
    for cover in reversed(there):
        if cover is found:
            return
        log.warning("%s is mounted over %s; detaching it", shown(cover.source), cover.point)
        which = with_copies(operations.kernel.mounts(), cover)
        await operations.call("detach", operations.kernel.unmount, place, which, lazily=True)


async def _unmount_or_detach(
    operations: Operations, place: str, which: Mounts, mapping: Mapping, writes: Writes
) -> None:
    kernel = operations.kernel

    def unmount(*, is_cut_off: bool) -> KernelError | None:
        try:
            if is_cut_off:
                operations.cut_off.hold()
                kernel.unmount(place, which)
            else:
                operations.require_medium()
                writes.watch = writes.watch or kernel.watch_writes(mapping)
                writes.watch.unmount(place, which, anyway=True, before=operations.require_medium)
        except KernelError as error:
            if isinstance(error, FlushError) or not isinstance(error, MountError):
                writes.lost = writes.lost or f"it is not known whether all was written: {error}"
            return error
        finally:
            writes.close()
        kernel.remove_mount_point(place)
        return None

    try:
        # Asked before the call, which then waits for the error table; a thread would not.
        gone = operations.stop.medium_gone
        refusal = await operations.call("unmount", unmount, is_cut_off=gone)
    except MediumGoneError:  # the next call comes after the error table
        refusal = await operations.call("unmount", unmount, is_cut_off=True)
    if refusal is not None:
        said = fields("busy", MOUNT_POINT=point_of(kernel, place))
        log.warning("%s; detaching it from the tree", refusal, extra=said)
        await _detach(operations, place, which)
    if (left := first_of(mapping, mounts_at(kernel, place, mapping))) is not None:
        raise MountError("unmount", left.point, errno.EBUSY, "something is mounted over it")


async def _detach(operations: Operations, place: str, which: Mounts) -> None:
    kernel = operations.kernel

    def detach() -> None:
        if operations.stop.medium_gone:
            operations.cut_off.hold()
        kernel.unmount(place, which, lazily=True)

    try:
        await operations.call("detach", detach)
    finally:
        await operations.call("remove the mount point", kernel.remove_mount_point, place)
