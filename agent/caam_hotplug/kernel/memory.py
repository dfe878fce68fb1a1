"""Memory that key bytes pass through: never in a core dump, never on swap, always overwritten."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import ctypes_lib
from caam_hotplug.model import SecretBytes

_PR_SET_DUMPABLE: Final = 4
_PR_SET_THP_DISABLE: Final = 41
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE: Final = 32 << 10


def refuse_core_dumps() -> None:
    """No dump of this process's memory is ever written, and no debugger of others' reads it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)


def refuse_huge_pages() -> None:
    """The kernel gives this process pages as it needs them, wherever it gives others 2 MiB at once.

    A thread's stack would take that for a few calls, a heap for its last few pages. Source:
    transhuge.rst.
    """
    _prctl(_PR_SET_THP_DISABLE, 1)


def _prctl(option: int, value: int) -> None:
    long = ctypes.c_ulong
    ctypes_lib.declare("libc.so.6", "prctl", ctypes.c_int, (ctypes.c_int, long, long, long, long))(
        option, value, 0, 0, 0
    )


@contextmanager
def locked(length: int) -> Iterator[SecretBytes]:
    """A buffer of so many zeros that is never written to swap; overwritten on the way out.

    Raises: KernelError if the kernel does not let it be locked. Source: mlock(2).
    """
    with SecretBytes(bytearray(length)) as secret:
        view = (ctypes.c_char * length).from_buffer(secret.buffer)
        address = ctypes.addressof(view)
        _call("mlock", address, length)
        try:
            yield secret
        finally:
            secret.wipe()
            del view  # or the buffer could not be let go
            _call("munlock", address, length)


@contextmanager
def random_key(length: int) -> Iterator[SecretBytes]:
    """A key of the kernel's random bytes without a zero among them, in a locked buffer.

    The CAAM's driver takes a key that it is given as a text, which a zero byte would end. Raises:
    KernelError. Source: getrandom(2).
    """
    with locked(length) as key:
        view = (ctypes.c_char * length).from_buffer(key.buffer)
        address = ctypes.addressof(view)
        try:
            _fill(address, length)
            while (at := key.buffer.find(0)) >= 0:
                _fill(address + at, 1)
        finally:
            del view
        yield key


def _fill(address: int, length: int) -> None:
    getrandom = ctypes_lib.declare(
        "libc.so.6", "getrandom", ctypes.c_ssize_t,
        (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint), ctypes_lib.minus_one_is_failure,
    )  # fmt: skip
    try:
        done = getrandom(address, length, 0)  # up to 256 bytes come whole
    except OSError as error:
        raise KernelError("get", "random bytes", error.errno or 0) from error
    if done != length:
        raise KernelError("get", "random bytes", 0, f"{done} of {length} came")


def _call(name: str, address: int, length: int) -> None:
    function = ctypes_lib.declare(
        "libc.so.6", name, ctypes.c_int, (ctypes.c_void_p, ctypes.c_size_t),
        ctypes_lib.minus_one_is_failure,
    )  # fmt: skip
    try:
        function(address, length)
    except OSError as error:
        raise KernelError("lock", "memory for a key", error.errno or 0) from error


def share_one_heap() -> None:
    """All threads allocate from one heap, and what they free is used again, or given back.

    glibc gives threads heaps of their own, up to eight for each processor, and each keeps what its
    largest moment needed. Every call of ours has a thread. Nor does glibc give back a large buffer
    once it has seen one of that size freed, unless it is told what large is. Another C library has
    no such heaps. Source: mallopt(3).
    """
    mallopt = getattr(ctypes_lib.library("libc.so.6"), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, 1)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
