"""The table of libdevmapper, which `devmapper` calls."""

from __future__ import annotations

import errno
from ctypes import POINTER, Structure, c_char_p, c_int, c_int32, c_uint32, c_uint64, c_void_p
from typing import Any, ClassVar

from caam_hotplug.kernel.ctypes_lib import Function, Library, failed, null, zero
from caam_hotplug.kernel.libc import Libc


class DmInfo(Structure):
    """struct dm_info of libdevmapper.h."""

    _fields_ = (
        ("exists", c_int),
        ("suspended", c_int),
        ("live_table", c_int),
        ("inactive_table", c_int),
        ("open_count", c_int32),
        ("event_nr", c_uint32),
        ("major", c_uint32),
        ("minor", c_uint32),
        ("read_only", c_int),
        ("target_count", c_int32),
        ("deferred_remove", c_int),
        ("internal_suspend", c_int),
    )


def _task_failed(result: int, function: Any, arguments: tuple[Any, ...]) -> int:
    """Raise the task's error number for 0.

    libdevmapper has none if it did not ask the kernel. Before the first answer that is for want of
    a device-mapper, later of memory: then nothing is known.
    """
    number = 0 if result else Devmapper.dm_task_get_errno(arguments[0])
    Devmapper.has_answered |= bool(result or number)
    if not result:
        raise failed(function, number or (errno.ENOMEM if Devmapper.has_answered else 0))
    return result


class Devmapper(Library, soname="libdevmapper.so.1.02.1", package="libdevmapper1.02.1"):
    """Source: libdevmapper.h."""

    dm_get_next_target = Function(
        c_void_p, c_void_p, c_void_p,
        POINTER(c_uint64), POINTER(c_uint64), POINTER(c_char_p), POINTER(c_char_p),
    )  # fmt: skip
    dm_log_with_errno_init = Function(None, c_void_p)
    dm_task_add_target = Function(
        c_int, c_void_p, c_uint64, c_uint64, c_char_p, c_char_p, failure=zero
    )
    dm_task_create = Function(c_void_p, c_int, failure=null)
    dm_task_deferred_remove = Function(c_int, c_void_p, failure=zero)
    dm_task_destroy = Function(None, c_void_p)
    dm_task_get_errno = Function(c_int, c_void_p)
    dm_task_get_info = Function(c_int, c_void_p, POINTER(DmInfo), failure=zero)
    dm_task_get_name = Function(c_char_p, c_void_p)
    dm_task_get_names = Function(c_void_p, c_void_p, failure=null)
    dm_task_get_uuid = Function(c_char_p, c_void_p)
    dm_task_get_versions = Function(c_void_p, c_void_p, failure=null)
    dm_task_run = Function(c_int, c_void_p, failure=_task_failed)
    dm_task_secure_data = Function(c_int, c_void_p, failure=zero)
    dm_task_set_message = Function(c_int, c_void_p, c_char_p, failure=zero)
    dm_task_set_name = Function(c_int, c_void_p, c_char_p, failure=zero)
    dm_task_set_ro = Function(c_int, c_void_p, failure=zero)
    dm_task_set_uuid = Function(c_int, c_void_p, c_char_p, failure=zero)
    dm_task_update_nodes = Function(None)
    dm_udev_set_sync_support = Function(None, c_int)

    has_answered: ClassVar[bool] = False
    """Whether the kernel has answered a call."""
    nodes_to_update: ClassVar[int] = 0
    """How many nodes it may remember, see `_update_links`."""

    @classmethod
    def prepare(cls) -> None:
        """Silence libdevmapper, which would print what our errors say with more context.

        Any C function that ignores its arguments will do. A Python callback would need memory that
        is writable and executable, which the service's confinement denies (MemoryDenyWriteExecute).
        """
        cls.dm_log_with_errno_init(Libc.getpid.pointer())
        cls.dm_udev_set_sync_support(0)
