"""Declaring C functions: types always spelled, errors raised by the binding itself."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Any

Errcheck = Callable[[Any, Any, tuple[Any, ...]], Any]


@cache
def library(soname: str) -> ctypes.CDLL:
    """The shared library, opened once. Raises: OSError if it is not installed."""
    return ctypes.CDLL(soname, use_errno=True)


def declare(
    soname: str,
    name: str,
    result: Any,
    arguments: tuple[Any, ...],
    errcheck: Errcheck | None = None,
) -> Any:
    """A C function with its types. Undeclared ones would break 64-bit values on 32-bit ARM."""
    function = library(soname)[name]
    function.restype = result
    function.argtypes = arguments
    if errcheck is not None:
        function.errcheck = errcheck
    return function


def syscall(number: int, *arguments: int | bytes | None) -> int:
    """A system call that libc may lack a wrapper for. Raises: OSError with its errno.

    Every argument is passed as a long or a pointer; none of the calls used here takes a 64-bit
    value on a 32-bit machine.
    """
    function = library("libc.so.6").syscall
    function.restype = ctypes.c_long
    typed = [
        ctypes.c_long(value) if isinstance(value, int) else ctypes.c_char_p(value)
        for value in arguments
    ]
    returned = int(function(ctypes.c_long(number), *typed))
    if returned < 0:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno))
    return returned


def minus_one_is_failure(result: Any, function: Any, _arguments: tuple[Any, ...]) -> Any:
    """An errcheck for functions that return -1 and set errno. Raises: OSError."""
    if result == -1:
        errno = ctypes.get_errno()
        raise OSError(errno, os.strerror(errno), function.__name__)
    return result
