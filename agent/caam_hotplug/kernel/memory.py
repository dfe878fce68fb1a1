"""Memory for key bytes: never in a core dump, never on swap, always overwritten."""

from __future__ import annotations

import ctypes
import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.model import SecretBytes

_PR_SET_DUMPABLE: Final = 4
_PR_SET_THP_DISABLE: Final = 41
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8
_LARGE: Final = 32 << 10


def refuse_core_dumps() -> None:
    """Forbid dumps of this process's memory, and other users' debuggers."""
    with reported_as("refuse", "core dumps"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def refuse_huge_pages() -> None:
    """Have the kernel give this process small pages, where it gives others 2 MiB at once.

    A thread's stack would take 2 MiB for a few calls, a heap for its last few pages. Source:
    transhuge.rst.
    """
    with suppress(OSError):  # the process then takes more memory, and works
        Libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


@contextmanager
def locked(length: int) -> Iterator[SecretBytes]:
    """Yield a buffer of so many zeros that is never written to swap, and overwrite it at the end.

    Raises: KernelError if the kernel does not let it be locked. Source: mlock(2).
    """
    with SecretBytes(bytearray(length)) as secret:
        view = (ctypes.c_char * length).from_buffer(secret.buffer)
        address = ctypes.addressof(view)
        with reported_as("lock", "memory for a key"):
            Libc.mlock(address, length)
        try:
            yield secret
        finally:
            secret.wipe()
            del view  # or the buffer could not be released
            with reported_as("unlock", "memory of a key"):
                Libc.munlock(address, length)


@contextmanager
def random_key(length: int) -> Iterator[SecretBytes]:
    """Yield a key of the kernel's random bytes, none of them zero, in a locked buffer.

    The CAAM's driver takes a given key as a text, which a zero byte would end. Raises:
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
    with reported_as("get", "random bytes"):
        done = Libc.getrandom(address, length, 0)  # up to 256 bytes come whole
    if done != length:
        raise KernelError("get", "random bytes", errno.EIO, f"{done} of {length} came")


def share_one_heap() -> None:
    """Have all threads allocate from one heap, and return large buffers to the kernel.

    glibc gives threads heaps of their own, up to eight for each processor. Each keeps what it
    needed at most, and every blocking call of the agent has a thread. Nor does glibc return a large
    buffer once it has seen one of that size freed, unless a threshold is set. Another C library
    has no such heaps. Source: mallopt(3).
    """
    if Libc.mallopt.exists:
        Libc.mallopt(_M_ARENA_MAX, 1)
        Libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
