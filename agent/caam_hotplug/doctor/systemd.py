"""What systemd says of a unit, over its own socket, through libsystemd.

systemctl asks there too. It works for root, whether or not a message bus runs.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.kernel import ctypes_lib

_LIBSYSTEMD: Final = "libsystemd.so.0"
SOCKET: Final = Path("/run/systemd/private")
_UNITS: Final = "/org/freedesktop/systemd1/unit/"
_UNIT: Final = b"org.freedesktop.systemd1.Unit"
_SERVICE: Final = b"org.freedesktop.systemd1.Service"
_SYSTEMD: Final = b"org.freedesktop.systemd1"


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit as systemd has it (org.freedesktop.systemd1(5))."""

    load_state: str
    """`loaded`, `not-found`, `masked`, `bad-setting` and others."""
    active_state: str
    """`active`, `activating`, `failed`, `inactive` and others."""
    sub_state: str
    file_state: str
    """`enabled`, `disabled` and others; empty if there is no file."""
    main_pid: int
    """0 if there is none, or the unit is no service."""


def unit(name: str, socket: Path = SOCKET) -> Unit:
    """The unit, loaded if it was not. Raises: OSError if systemd does not answer."""
    path = (_UNITS + re.sub(r"[^A-Za-z0-9]", lambda m: f"_{ord(m[0]):02x}", name)).encode()
    with _connection(socket) as bus:
        return Unit(
            load_state=_text(bus, path, b"LoadState"),
            active_state=_text(bus, path, b"ActiveState"),
            sub_state=_text(bus, path, b"SubState"),
            file_state=_text(bus, path, b"UnitFileState"),
            main_pid=_main_pid(bus, path) if name.endswith(".service") else 0,
        )


@contextmanager
def _connection(socket: Path) -> Iterator[Any]:
    """Raises: OSError."""
    if not socket.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(socket))
    bus = ctypes.c_void_p()
    _call("sd_bus_new", ctypes.byref(bus))
    try:
        _call("sd_bus_set_address", bus, f"unix:path={socket}".encode())
        _call("sd_bus_start", bus)
        yield bus
    finally:
        unref = ctypes_lib.declare(
            _LIBSYSTEMD, "sd_bus_flush_close_unref", ctypes.c_void_p, (ctypes.c_void_p,)
        )
        unref(bus)


def _text(bus: Any, path: bytes, member: bytes) -> str:
    found = ctypes.c_char_p()
    _call(
        "sd_bus_get_property_string", bus, _SYSTEMD, path, _UNIT, member, None,
        ctypes.byref(found),
    )  # fmt: skip
    text = (found.value or b"").decode(errors="replace")
    ctypes_lib.declare("libc.so.6", "free", None, (ctypes.c_void_p,))(found)
    return text


def _main_pid(bus: Any, path: bytes) -> int:
    found = ctypes.c_uint32()
    _call(
        "sd_bus_get_property_trivial", bus, _SYSTEMD, path, _SERVICE, b"MainPID", None,
        ctypes.c_char(b"u"), ctypes.byref(found),
    )  # fmt: skip
    return found.value


_POINTER, _TEXT = ctypes.c_void_p, ctypes.c_char_p
_PROPERTY: Final = (_POINTER, _TEXT, _TEXT, _TEXT, _TEXT, _POINTER)
_ARGUMENTS: Final[dict[str, tuple[Any, ...]]] = {
    "sd_bus_new": (_POINTER,),
    "sd_bus_set_address": (_POINTER, _TEXT),
    "sd_bus_start": (_POINTER,),
    "sd_bus_get_property_string": (*_PROPERTY, _POINTER),
    "sd_bus_get_property_trivial": (*_PROPERTY, ctypes.c_char, _POINTER),
}
"""Source: sd-bus(3)."""


def _call(name: str, *arguments: Any) -> None:
    """Raises: OSError; libsystemd returns minus the errno."""
    function = ctypes_lib.declare(_LIBSYSTEMD, name, ctypes.c_int, _ARGUMENTS[name])
    result = function(*arguments)
    if result < 0:
        raise OSError(-result, os.strerror(-result), name)
