"""Device-mapper through libdevmapper: the mappings that are ours, made, found, poisoned, removed.

No udev cookie is ever set. A cookie is a System V semaphore on which the caller waits for udevd;
a stopped udevd would hang it, a skipped wait leaks it (libdevmapper.h, dm_udev_wait). What it
buys, that udev's links are there before we go on, is not needed: devtmpfs makes `/dev/dm-N` at
once, and our udev rule keeps udev from opening our mappings.

libdevmapper keeps global state and is not thread-safe: all of this runs on one lane.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from caam_hotplug import names
from caam_hotplug.errors import DmError, MappingBusyError
from caam_hotplug.kernel import ctypes_lib
from caam_hotplug.model import DeviceNumber, Mapping, Sectors

_LINKS: Final = Path("/dev/mapper")
_LIBDEVMAPPER: Final = "libdevmapper.so.1.02.1"
_REMEMBERED_MOST: Final = 32
"""Nodes, before it is looked whether they can be forgotten."""

# enum of libdevmapper.h
_CREATE, _RELOAD, _REMOVE, _RESUME, _INFO, _TABLE, _LIST, _TARGET_MSG = 0, 1, 2, 5, 6, 11, 13, 17
_GET_TARGET_VERSION: Final = 20

_HINTS: Final = {
    errno.ENOENT: "the kernel lacks dm-crypt or the cipher",
    errno.ENOKEY: "the kernel does not find the key",
    errno.EINVAL: "the kernel log says more",
    errno.EBUSY: "the device is in use",
    errno.ENXIO: "the device has gone",
}


class _Info(ctypes.Structure):
    """struct dm_info of libdevmapper.h."""

    _fields_ = (
        ("exists", ctypes.c_int),
        ("suspended", ctypes.c_int),
        ("live_table", ctypes.c_int),
        ("inactive_table", ctypes.c_int),
        ("open_count", ctypes.c_int32),
        ("event_nr", ctypes.c_uint32),
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("read_only", ctypes.c_int),
        ("target_count", ctypes.c_int32),
        ("deferred_remove", ctypes.c_int),
        ("internal_suspend", ctypes.c_int),
    )


class _Library:
    """The functions used, declared once when the first mapping is looked for."""

    def __init__(self) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes_lib.declare(_LIBDEVMAPPER, name, result, arguments)

        task, text, u64 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64
        flag = ctypes.c_int
        self.create = function("dm_task_create", task, flag)
        self.destroy = function("dm_task_destroy", None, task)
        self.run = function("dm_task_run", flag, task)
        self.get_errno = function("dm_task_get_errno", flag, task)
        self.set_name = function("dm_task_set_name", flag, task, text)
        self.set_uuid = function("dm_task_set_uuid", flag, task, text)
        self.set_ro = function("dm_task_set_ro", flag, task)
        self.set_message = function("dm_task_set_message", flag, task, text)
        self.secure_data = function("dm_task_secure_data", flag, task)
        self.no_flush = function("dm_task_no_flush", flag, task)
        self.skip_lockfs = function("dm_task_skip_lockfs", flag, task)
        self.deferred_remove = function("dm_task_deferred_remove", flag, task)
        self.add_target = function("dm_task_add_target", flag, task, u64, u64, text, text)
        self.get_info = function("dm_task_get_info", flag, task, ctypes.POINTER(_Info))
        self.get_name = function("dm_task_get_name", text, task)
        self.get_uuid = function("dm_task_get_uuid", text, task)
        self.get_names = function("dm_task_get_names", ctypes.c_void_p, task)
        self.get_versions = function("dm_task_get_versions", ctypes.c_void_p, task)
        self.next_target = function(
            "dm_get_next_target", ctypes.c_void_p, task, ctypes.c_void_p,
            ctypes.POINTER(u64), ctypes.POINTER(u64), ctypes.POINTER(text), ctypes.POINTER(text),
        )  # fmt: skip
        self.update_nodes = function("dm_task_update_nodes", None)
        self.remembered = 0
        """How many nodes it may have to update."""
        # libdevmapper would print what our errors say with more context. Any C function that
        # ignores its arguments will do; a Python callback would need memory that is writable and
        # executable, which the service's confinement denies (MemoryDenyWriteExecute).
        ignore = ctypes.cast(ctypes_lib.library("libc.so.6").getpid, ctypes.c_void_p)
        function("dm_log_with_errno_init", None, ctypes.c_void_p)(ignore)
        function("dm_udev_set_sync_support", None, flag)(0)


_loaded: list[_Library] = []


def _library() -> _Library:
    if not _loaded:
        _loaded.append(_Library())
    return _loaded[0]


@contextmanager
def _task(kind: int, subject: str, *, by_uuid: bool = False) -> Iterator[int]:
    lib = _library()
    task = lib.create(kind)
    if not task:
        raise DmError("prepare a call for mapping", subject, errno.ENOMEM)
    try:
        named = lib.set_uuid if by_uuid else lib.set_name
        if subject and not named(task, subject.encode(errors="surrogateescape")):
            raise DmError("name mapping", subject, errno.EINVAL)
        yield task
    finally:
        lib.destroy(task)


def _run(task: int, operation: str, subject: str) -> None:
    lib = _library()
    if lib.run(task):
        return
    number = lib.get_errno(task) or errno.EIO
    kind = MappingBusyError if number == errno.EBUSY else DmError
    raise kind(operation, subject, number, _HINTS.get(number, ""))


def find(uuid: str) -> Mapping | None:
    """The mapping with this DM-UUID, or None. Raises: DmError. Lane: dm."""
    lib = _library()
    with _task(_TABLE, uuid, by_uuid=True) as task:
        if not lib.run(task):
            if lib.get_errno(task) in {0, errno.ENXIO}:
                return None
            _run(task, "look at mapping", uuid)
        info = _Info()
        if not lib.get_info(task, ctypes.byref(info)) or not info.exists:
            return None
        return Mapping(
            name=lib.get_name(task).decode(),
            uuid=uuid,
            number=DeviceNumber(info.major, info.minor),
            table=tuple(_target_lines(task)),
            open_count=info.open_count,
        )


def _target_lines(task: int) -> Iterator[str]:
    start, length = ctypes.c_uint64(), ctypes.c_uint64()
    kind, parameters = ctypes.c_char_p(), ctypes.c_char_p()
    cursor = None
    while True:
        cursor = _library().next_target(
            task, cursor, ctypes.byref(start), ctypes.byref(length), ctypes.byref(kind),
            ctypes.byref(parameters),
        )  # fmt: skip
        if kind.value is not None:
            text = (parameters.value or b"").decode().strip()
            yield f"{start.value} {length.value} {kind.value.decode()} {text}".rstrip()
        if not cursor:
            return


def ours(prefix: str = names.DM_UUID_PREFIX) -> list[Mapping]:
    """Every mapping whose DM-UUID has the prefix. Raises: DmError. Lane: dm."""
    found = (find(uuid) for name in _all_names() if (uuid := _uuid_of(name, prefix)))
    return [mapping for mapping in found if mapping is not None]


def _all_names() -> list[str]:
    """struct dm_names of libdevmapper.h: u64 dev, u32 offset of the next, name."""
    with _task(_LIST, "") as task:
        _run(task, "list", "mappings")
        at = _library().get_names(task)
        result: list[str] = []
        if not at or not ctypes.c_uint64.from_address(at).value:
            return result
        while True:
            # Others may name theirs in any bytes, which must not end a look for ours.
            result.append(ctypes.string_at(at + 12).decode(errors="surrogateescape"))
            step = ctypes.c_uint32.from_address(at + 8).value
            if not step:
                return result
            at += step


def _uuid_of(name: str, prefix: str) -> str | None:
    lib = _library()
    with _task(_INFO, name) as task:
        if not lib.run(task):
            return None
        uuid = (lib.get_uuid(task) or b"").decode(errors="surrogateescape")
        return uuid if uuid.startswith(prefix) else None


def target_version(kind: str) -> tuple[int, int, int] | None:
    """The version of a kind of target, its module loaded if need be; None if the kernel has none.

    Raises: DmError if there is no device-mapper. Lane: dm. Source: DM_GET_TARGET_VERSION in
    dm-ioctl.h; struct dm_versions of libdevmapper.h: u32 offset of the next, three u32, name.
    """
    lib = _library()
    with _task(_GET_TARGET_VERSION, kind) as task:
        if not lib.run(task):
            if lib.get_errno(task) == errno.EINVAL:
                return None
            _run(task, "look for target", kind)
        at = lib.get_versions(task)
        if not at:
            return None
        major, minor, patch = (ctypes.c_uint32.from_address(at + 4 * n).value for n in (1, 2, 3))
        return major, minor, patch


def create(name: str, uuid: str) -> None:
    """A mapping without a table exists. Raises: DmError (EBUSY if name or UUID is taken)."""
    with _task(_CREATE, name) as task:
        if not _library().set_uuid(task, uuid.encode()):
            raise DmError("name mapping", uuid, errno.EINVAL)
        _run(task, "create mapping", name)


def load(name: str, line: str, *, read_only: bool) -> None:
    """The mapping has this target line as its inactive table; dm-crypt has taken its key.

    Raises: DmError. Lane: dm. Source: crypt_set_keyring_key in dm-crypt.c, which copies the key.
    """
    start, length, kind, parameters = line.split(" ", 3)
    lib = _library()
    with _task(_RELOAD, name) as task:
        lib.secure_data(task)
        if read_only:
            lib.set_ro(task)
        lib.add_target(task, int(start), int(length), kind.encode(), parameters.encode())
        _run(task, "load table of mapping", name)


def resume(name: str) -> None:
    """The mapping's table is live; `/dev/mapper/NAME` leads to it, soon. Raises: DmError."""
    with _task(_RESUME, name) as task:
        _run(task, "activate mapping", name)
    _update_links(at_once=False)


def _update_links(*, at_once: bool) -> None:
    """/dev/mapper is as it should be, if it is ours to keep; it is udev's where udevd runs.

    libdevmapper remembers each node that it would make or remove until it is told to. With udevd
    that is when all links are there: nothing is left to make then, which would be in udev's way. To
    look at all of them takes the longer the more there are: it is done now and then, or `at_once`.
    """
    lib = _library()
    lib.remembered += 1
    is_ours = not names.UDEV_CONTROL.exists()
    due = at_once or lib.remembered >= _REMEMBERED_MOST
    if is_ours or (due and _links_are_there()):
        lib.update_nodes()
        lib.remembered = 0


def _links_are_there() -> bool:
    mappings = {name for name in _all_names() if name.startswith(names.DM_NAME_PREFIX)}
    return all((_LINKS / name).exists() for name in mappings)


def poison(name: str, size: Sectors) -> None:
    """Every read and write of the mapping fails, and the kernel has wiped its key.

    What was in flight is not flushed: its medium has gone. Raises: DmError. Lane: dm.
    """
    lib = _library()
    with _task(_RELOAD, name) as task:
        lib.add_target(task, 0, int(size), b"error", b"")
        _run(task, "load error table of mapping", name)
    with _task(_RESUME, name) as task:
        lib.no_flush(task)
        lib.skip_lockfs(task)
        _run(task, "activate error table of mapping", name)


def remove(name: str) -> None:
    """The mapping is gone, or will be the moment its last holder closes it.

    Removal is asked for as deferred, so that a passing opener (udev's blkid, say) needs no retry:
    the kernel removes the mapping at its last close. One that does not exist is no error.
    Raises: DmError. Lane: dm. Source: DM_DEFERRED_REMOVE in dm-ioctl.h.
    """
    lib = _library()
    with _task(_REMOVE, name) as task:
        lib.deferred_remove(task)
        if not lib.run(task) and lib.get_errno(task) not in {0, errno.ENXIO}:
            _run(task, "remove mapping", name)
    _update_links(at_once=True)


def keep(name: str) -> None:
    """A removal that was deferred earlier is called off. Raises: DmError (ENXIO if it has gone)."""
    with _task(_TARGET_MSG, name) as task:
        _library().set_message(task, b"@cancel_deferred_remove")
        _run(task, "keep mapping", name)
