"""Memory that key bytes pass through: never in a core dump, never on swap, always overwritten."""

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
    """No dump of this process's memory is ever written, and no debugger of others' reads it."""
    with reported_as("refuse", "core dumps"):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        Libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def refuse_huge_pages() -> None:
    """The kernel gives this process pages as it needs them, wherever it gives others 2 MiB at once.

    A thread's stack would take that for a few calls, a heap for its last few pages. Source:
    transhuge.rst.
    """
    with suppress(OSError):  # a kernel that cannot gives more memory, which harms nothing
        Libc.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)


@contextmanager
def locked(length: int) -> Iterator[SecretBytes]:
    """A buffer of so many zeros that is never written to swap; overwritten on the way out.

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
            del view  # or the buffer could not be let go
            with reported_as("unlock", "memory of a key"):
                Libc.munlock(address, length)


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
    with reported_as("get", "random bytes"):
        done = Libc.getrandom(address, length, 0)  # up to 256 bytes come whole
    if done != length:
        raise KernelError("get", "random bytes", errno.EIO, f"{done} of {length} came")


def share_one_heap() -> None:
    """All threads allocate from one heap, and what they free is used again, or given back.

    glibc gives threads heaps of their own, up to eight for each processor, and each keeps what its
    largest moment needed. Every call of ours has a thread. Nor does glibc give back a large buffer
    once it has seen one of that size freed, unless it is told what large is. Another C library has
    no such heaps. Source: mallopt(3).
    """
    if Libc.mallopt.exists:
        Libc.mallopt(_M_ARENA_MAX, 1)
        Libc.mallopt(_M_MMAP_THRESHOLD, _LARGE)
