"""Device-mapper through libdevmapper: our mappings are created, found, loaded and removed.

No udev cookie is ever set. A cookie is a System V semaphore on which the caller waits for udevd;
a stopped udevd would hang it, a skipped wait leaks it (libdevmapper.h, dm_udev_wait). What it
buys, that udev's links are there before we go on, is not needed: devtmpfs makes `/dev/dm-N` at
once, and our udev rule keeps udev from opening our mappings.

libdevmapper keeps global state and is not thread-safe: all of this runs on one worker.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import byref, c_char_p, c_uint32, c_uint64, string_at
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import DmError, MappingBusyError
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libdevmapper import Devmapper, DmInfo
from caam_hotplug.model import DeviceNumber, Mapping

_LINKS: Final = Path("/dev/mapper")
_REMEMBERED_MOST: Final = 32
"""Nodes, before a check whether they can be forgotten."""
_NO_MAPPING: Final = (0, errno.ENXIO)
"""Error numbers of a call for a mapping that is not there; 0 where there is no device-mapper."""

# enum of libdevmapper.h
_CREATE, _RELOAD, _REMOVE, _RESUME = 0, 1, 2, 5
_INFO, _TABLE, _LIST, _CLEAR, _TARGET_MSG = 6, 11, 13, 14, 17
_GET_TARGET_VERSION: Final = 20

_HINTS: Final = {
    errno.ENOENT: "the kernel lacks dm-crypt or the cipher",
    errno.ENOKEY: "the kernel does not find the key",
    errno.EINVAL: "the kernel log says more",
    errno.EBUSY: "the device is in use",
    errno.ENXIO: "the device has gone",
}


def _error(operation: str, subject: str, number: int) -> DmError:
    kind = MappingBusyError if number == errno.EBUSY else DmError
    return kind(operation, subject, number, _HINTS.get(number, ""))


@contextmanager
def _task(kind: int, operation: str, subject: str, *, by_uuid: bool = False) -> Iterator[int]:
    """Yield a call to be filled in and run. Raises: DmError, also for the block's failed calls."""
    with reported_as(operation, subject, _error):
        task = Devmapper.dm_task_create(kind)
        try:
            name = Devmapper.dm_task_set_uuid if by_uuid else Devmapper.dm_task_set_name
            if subject:
                with reported_as("name mapping", subject, DmError):
                    name(task, subject.encode(errors="surrogateescape"))
            yield task
        finally:
            Devmapper.dm_task_destroy(task)


def _run(task: int, *absent: int) -> bool:
    """Run the call; return False if it failed with one of the error numbers. Raises: OSError."""
    try:
        Devmapper.dm_task_run(task)
    except OSError as error:
        if error.errno not in absent:
            raise
        return False
    return True


def find(uuid: str) -> Mapping | None:
    """Return the mapping with this DM-UUID, or None. Raises: DmError. Worker: dm."""
    with _task(_TABLE, "look at mapping", uuid, by_uuid=True) as task:
        if not _run(task, *_NO_MAPPING):
            return None
        info = DmInfo()
        Devmapper.dm_task_get_info(task, byref(info))
        if not info.exists:
            return None
        return Mapping(
            name=Devmapper.dm_task_get_name(task).decode(),
            uuid=uuid,
            number=DeviceNumber(info.major, info.minor),
            table=tuple(_target_lines(task)),
            open_count=info.open_count,
            is_suspended=bool(info.suspended),
            is_removed_at_last_close=bool(info.deferred_remove),
        )


def _target_lines(task: int) -> Iterator[str]:
    start, length, kind, parameters = c_uint64(), c_uint64(), c_char_p(), c_char_p()
    cursor = None
    while True:
        cursor = Devmapper.dm_get_next_target(
            task, cursor, byref(start), byref(length), byref(kind), byref(parameters)
        )
        if kind.value is not None:
            text = (parameters.value or b"").decode().strip()
            yield f"{start.value} {length.value} {kind.value.decode()} {text}".rstrip()
        if not cursor:
            return


def ours(prefix: str = names.DM_UUID_PREFIX) -> list[Mapping]:
    """Return every mapping whose DM-UUID has the prefix. Raises: DmError. Worker: dm."""
    found = (find(uuid) for name in _all_names() if (uuid := _uuid_of(name, prefix)))
    return [mapping for mapping in found if mapping is not None]


def _all_names() -> list[str]:
    """Return the names of all mappings, others' included. Raises: DmError.

    struct dm_names of libdevmapper.h: u64 dev, u32 offset of the next, name.
    """
    with _task(_LIST, "list mappings", "") as task:
        _run(task)
        at = Devmapper.dm_task_get_names(task)
        result: list[str] = []
        if not c_uint64.from_address(at).value:
            return result
        while True:
            # Others may name theirs in any bytes, which must not end a search for ours.
            result.append(string_at(at + 12).decode(errors="surrogateescape"))
            step = c_uint32.from_address(at + 8).value
            if not step:
                return result
            at += step


def _uuid_of(name: str, prefix: str) -> str | None:
    """Return the mapping's DM-UUID if it has the prefix; None also if the mapping has gone."""
    with _task(_INFO, "look at mapping", name) as task:
        try:
            Devmapper.dm_task_run(task)
        except OSError:
            return None
        uuid: bytes = Devmapper.dm_task_get_uuid(task) or b""
    text = uuid.decode(errors="surrogateescape")
    return text if text.startswith(prefix) else None


def target_version(kind: str) -> tuple[int, int, int] | None:
    """Return the version of a kind of target; None if the kernel has none.

    The kernel loads the target's module if need be. Raises: DmError if there is no device-mapper.
    Worker: dm. Source: DM_GET_TARGET_VERSION in dm-ioctl.h; struct dm_versions of libdevmapper.h:
    u32 offset of the next, three u32, name.
    """
    with _task(_GET_TARGET_VERSION, "look for target", kind) as task:
        if not _run(task, errno.EINVAL):
            return None
        at = Devmapper.dm_task_get_versions(task)
        major, minor, patch = (c_uint32.from_address(at + 4 * n).value for n in (1, 2, 3))
        return major, minor, patch


def create(name: str, uuid: str) -> None:
    """Create a mapping without a table. Raises: DmError (EBUSY if name or UUID is taken)."""
    with _task(_CREATE, "create mapping", name) as task:
        with reported_as("name mapping", uuid, DmError):
            Devmapper.dm_task_set_uuid(task, uuid.encode())
        Devmapper.dm_task_run(task)


def load(name: str, line: str, *, read_only: bool) -> None:
    """Load the target line as the mapping's inactive table; dm-crypt takes its key.

    Raises: DmError. Worker: dm. Source: crypt_set_keyring_key in dm-crypt.c, which copies the key.
    """
    start, length, kind, parameters = line.split(" ", 3)
    with _task(_RELOAD, "load table of mapping", name) as task:
        Devmapper.dm_task_secure_data(task)
        if read_only:
            Devmapper.dm_task_set_ro(task)
        Devmapper.dm_task_add_target(
            task, int(start), int(length), kind.encode(), parameters.encode()
        )
        Devmapper.dm_task_run(task)


def clear(name: str) -> None:
    """Drop the mapping's inactive table, if it has one. Raises: DmError. Worker: dm."""
    with _task(_CLEAR, "drop the inactive table of mapping", name) as task:
        Devmapper.dm_task_run(task)


def resume(name: str) -> None:
    """Activate the mapping's table; `/dev/mapper/NAME` leads to it, soon. Raises: DmError."""
    with _task(_RESUME, "activate mapping", name) as task:
        Devmapper.dm_task_run(task)
    _update_links(at_once=False)


def _update_links(*, at_once: bool) -> None:
    """Bring /dev/mapper up to date, if that is ours; where udevd runs, it is udev's.

    libdevmapper remembers each node that it would make or remove until a call asks for it. With
    udevd that call is made when all links are there: nothing is left to make then, which would be
    in udev's way. A check of many links takes long, so it is done now and then, or `at_once`.
    """
    Devmapper.nodes_to_update += 1
    is_ours = not names.UDEV_CONTROL.exists()
    due = at_once or Devmapper.nodes_to_update >= _REMEMBERED_MOST
    if is_ours or (due and _links_are_there()):
        Devmapper.dm_task_update_nodes()
        Devmapper.nodes_to_update = 0


def _links_are_there() -> bool:
    mappings = {name for name in _all_names() if name.startswith(names.DM_NAME_PREFIX)}
    return all((_LINKS / name).exists() for name in mappings)


def remove(name: str) -> None:
    """Remove the mapping, at its last close if it is open. One that does not exist is no error.

    Removal is asked for as deferred, so that a passing opener, such as udev's blkid, needs no
    retry. Raises: DmError. Worker: dm. Source: DM_DEFERRED_REMOVE in dm-ioctl.h.
    """
    with _task(_REMOVE, "remove mapping", name) as task:
        Devmapper.dm_task_deferred_remove(task)
        _run(task, *_NO_MAPPING)
    _update_links(at_once=True)


def keep(name: str) -> None:
    """Cancel a deferred removal. Raises: DmError (ENXIO if the mapping has gone)."""
    with _task(_TARGET_MSG, "keep mapping", name) as task:
        Devmapper.dm_task_set_message(task, b"@cancel_deferred_remove")
        Devmapper.dm_task_run(task)
