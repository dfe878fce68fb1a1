from __future__ import annotations

import errno
import re
import subprocess
import sys
from ctypes import c_char_p, c_int, c_long, c_size_t, c_void_p
from pathlib import Path

import pytest

from caam_hotplug.doctor.systemd import Systemd
from caam_hotplug.errors import HotplugError, KernelError, MountError
from caam_hotplug.kernel.blkid import Blkid
from caam_hotplug.kernel.ctypes_lib import (
    Function,
    Library,
    minus_one,
    negative,
    null,
    reported_as,
    zero,
)
from caam_hotplug.kernel.gpt import Fdisk
from caam_hotplug.kernel.keyring import Keyutils
from caam_hotplug.kernel.libc import Libc
from caam_hotplug.kernel.libdevmapper import Devmapper

AGENT = Path(__file__).parents[3] / "agent"
TABLES = (Blkid, Devmapper, Fdisk, Keyutils, Libc, Systemd)


class Clib(Library, soname="libc.so.6", package="libc6"):
    """Functions whose results are easily had, as if each meant failure."""

    atoi = Function(c_int, c_char_p, failure=zero)
    atol = Function(c_long, c_char_p, failure=negative)
    close = Function(c_int, c_int, failure=minus_one)
    getenv = Function(c_void_p, c_char_p, failure=null)
    strlen = Function(c_size_t, c_char_p)
    no_such_function = Function(c_int)


class Missing(Library, soname="libmissing.so.0", package="libmissing0"):
    """A library that no system has."""

    function = Function(c_int)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.soname)
def test_a_library_has_every_function_of_its_table(table: type[Library]) -> None:
    functions = [entry for entry in vars(table).values() if type(entry) is Function]
    assert functions
    assert [function.name for function in functions if not function.exists] == []


def test_a_function_takes_its_arguments_and_returns_its_result() -> None:
    assert Clib.strlen(b"four") == 4
    with pytest.raises(Exception, match="argument 1"):
        Clib.strlen(4.0)


def test_a_function_that_the_library_lacks_does_not_exist() -> None:
    assert not Clib.no_such_function.exists
    assert Clib.strlen.exists


@pytest.mark.parametrize(
    ("function", "argument", "number"),
    [
        (Clib.close, -1, errno.EBADF),
        (Clib.atol, b"-9", errno.EBADF),
        (Clib.atoi, b"0", errno.EINVAL),
        (Clib.getenv, b"NO=SUCH", errno.ENOMEM),
    ],
)
def test_a_failure_raises_its_error_number(
    function: Function, argument: object, number: int
) -> None:
    with pytest.raises(OSError) as error:
        function(argument)
    assert (error.value.errno, error.value.filename) == (number, function.name)


def test_what_is_no_failure_is_returned() -> None:
    assert Clib.atol(b"3") == 3
    assert Clib.atoi(b"3") == 3
    assert Clib.getenv(b"PATH")


def test_a_failed_system_call_raises_errno() -> None:
    with pytest.raises(OSError) as error:
        Libc.fsmount(-1, 0, 0)
    assert error.value.errno in {errno.EBADF, errno.EPERM}


def test_a_missing_library_is_named_with_its_package() -> None:
    with pytest.raises(KernelError) as error:
        Missing.function()
    assert str(error.value).startswith("open library libmissing.so.0: ")
    assert str(error.value).endswith("(cannot open shared object file: No such file or directory; "
                                     "Debian's package is libmissing0)")  # fmt: skip


def test_an_error_is_reported_with_operation_and_subject() -> None:
    with pytest.raises(MountError) as error, reported_as("unmount", "/mnt", MountError):
        Clib.close(-1)
    assert str(error.value) == "unmount /mnt: Bad file descriptor"


def test_an_error_without_a_number_is_reported_as_one_of_input_or_output() -> None:
    with pytest.raises(KernelError) as error, reported_as("read", "/dev/sda"):
        raise OSError
    assert error.value.errno == errno.EIO


def test_an_error_that_has_its_words_passes() -> None:
    with pytest.raises(HotplugError, match=r"^as it was$"), reported_as("read", "/dev/sda"):
        raise HotplugError("as it was")


def test_the_agents_import_opens_no_library_of_a_table() -> None:
    script = (
        "import caam_hotplug.daemon.main\n"
        "from caam_hotplug.kernel.ctypes_lib import Library\n"
        "tables = Library.__subclasses__()\n"
        "assert len(tables) > 3, tables\n"
        "assert not [t for t in tables if t._opened is not None]"
    )
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": str(AGENT)}, check=True)


def test_no_other_module_declares_a_function() -> None:
    declares = re.compile(r"CDLL|argtypes|restype|errcheck")
    found = [f.name for f in AGENT.rglob("*.py") if declares.search(f.read_text())]
    assert found == ["ctypes_lib.py"]
