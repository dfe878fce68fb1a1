"""How every C function is declared: one entry in the table of its library.

A table is a class that is never instantiated; the functions have the names that C gives them:

    class _Keyutils(Library, soname="libkeyutils.so.1", package="libkeyutils1"):
        keyctl_unlink = Function(c_long, c_int32, c_int32, failure=minus_one)

    with reported_as("unlink key", description, KeyringError):
        _Keyutils.keyctl_unlink(serial, keyring)

An entry has the result's type, the arguments' types, and which result means failure:

    minus_one    -1, with errno
    negative     below zero, minus an error number
    zero         0, for lack of validity (EINVAL)
    null         a null pointer, for lack of memory (ENOMEM)
    none given   the function cannot fail, or its failure changes nothing

A library with other rules has a check of its own beside its table. Every check raises OSError, so
no caller tests a result. `reported_as` turns it into an error that names operation and subject.

The library is opened and the function bound at the first call: an import opens nothing.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from caam_hotplug.errors import HotplugError, KernelError

Failure = Callable[[Any, Any, tuple[Any, ...]], Any]
"""Of result, function and arguments: raise OSError, or return the result (ctypes' `errcheck`)."""


class Library:
    """Base of the tables."""

    soname: ClassVar[str]
    package: ClassVar[str]
    """Debian's name."""
    _opened: ClassVar[ctypes.CDLL | None] = None

    def __init_subclass__(cls, *, soname: str, package: str) -> None:
        cls.soname = soname
        cls.package = package

    @classmethod
    def open(cls) -> ctypes.CDLL:
        """Open the library unless it is open. Raises: KernelError if it cannot be loaded."""
        if cls._opened is None:
            try:
                cls._opened = ctypes.CDLL(cls.soname, use_errno=True)
            except OSError as error:
                cause = str(error).removeprefix(f"{cls.soname}: ")
                hint = f"{cause}; Debian's package is {cls.package}"
                raise KernelError("open library", cls.soname, errno.ELIBACC, hint) from error
            cls.prepare()
        return cls._opened

    @classmethod
    def prepare(cls) -> None:
        """Make the calls that precede all others. A table that needs some overrides this."""


class Function:
    """A C function with its types. An undeclared one would break 64-bit values on 32-bit ARM."""

    __slots__ = ("_arguments", "_bound", "_failure", "_library", "_result", "name")

    def __init__(self, result: Any, *arguments: Any, failure: Failure | None = None) -> None:
        self._result = result
        self._arguments = arguments
        self._failure = failure
        self._bound: Callable[..., Any] | None = None

    def __set_name__(self, library: type[Library], name: str) -> None:
        self.name = name
        self._library = library

    def __call__(self, *arguments: Any) -> Any:
        """Call the function. Raises: OSError at its failure; KernelError without the library."""
        return (self._bound or self._bind())(*arguments)

    @property
    def exists(self) -> bool:
        """Return whether this system's library has the function."""
        return hasattr(self._library.open(), self.name)

    def pointer(self) -> ctypes.c_void_p:
        """Return the function's address, for a C function that takes one."""
        return ctypes.cast(self._library.open()[self.name], ctypes.c_void_p)

    def _bind(self) -> Callable[..., Any]:
        self._bound = self._typed(self.name, self._arguments)
        return self._bound

    def _typed(self, symbol: str, arguments: tuple[Any, ...]) -> Callable[..., Any]:
        function = self._library.open()[symbol]
        function.restype = self._result
        function.argtypes = arguments
        if self._failure is not None:
            function.errcheck = self._failure
        return function


class SystemCall(Function):
    """A system call for which the C library may lack a function.

    Arguments are longs and pointers, as syscall(2) takes them; no call used here takes a 64-bit
    value on a 32-bit machine.
    """

    __slots__ = ("_number",)

    def __init__(self, number: int, *arguments: Any) -> None:
        super().__init__(ctypes.c_long, *arguments, failure=minus_one)
        self._number = number

    def _bind(self) -> Callable[..., Any]:
        syscall = self._typed("syscall", (ctypes.c_long, *self._arguments))
        self._bound = partial(syscall, self._number)
        return self._bound


class reported_as:  # noqa: N801  it reads as a statement; a generator takes three times as long
    """Raise an OSError of the block as `error` with operation and subject; others pass."""

    __slots__ = ("_error", "_operation", "_subject")

    def __init__(
        self,
        operation: str,
        subject: str,
        error: Callable[[str, str, int], KernelError] = KernelError,
    ) -> None:
        self._operation = operation
        self._subject = subject
        self._error = error

    def __enter__(self) -> None:
        pass

    def __exit__(self, _kind: object, cause: BaseException | None, _trace: object) -> None:
        if isinstance(cause, OSError) and not isinstance(cause, HotplugError):
            raise self._error(self._operation, self._subject, cause.errno or errno.EIO) from cause


def minus_one(result: Any, function: Any, _arguments: tuple[Any, ...]) -> Any:
    """Raise errno for -1."""
    if result == -1:
        raise failed(function, ctypes.get_errno())
    return result


def negative(result: Any, function: Any, _arguments: tuple[Any, ...]) -> Any:
    """Raise the error number that is minus the result."""
    if result < 0:
        raise failed(function, -result)
    return result


def zero(result: Any, function: Any, _arguments: tuple[Any, ...]) -> Any:
    """Raise EINVAL for 0."""
    if result == 0:
        raise failed(function, errno.EINVAL)
    return result


def null(result: Any, function: Any, _arguments: tuple[Any, ...]) -> Any:
    """Raise ENOMEM for a null pointer."""
    if not result:
        raise failed(function, errno.ENOMEM)
    return result


def failed(function: Any, number: int) -> OSError:
    """Return the error to raise for a failed function."""
    return OSError(number, os.strerror(number), function.__name__)
