"""The state of a systemd unit, over systemd's own socket, through libsystemd.

systemctl asks there, too. It works for root, whether or not a message bus runs.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char, c_char_p, c_int, c_uint32, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.kernel.ctypes_lib import Function, Library, negative
from caam_hotplug.kernel.libc import Libc

SOCKET: Final = Path("/run/systemd/private")
_UNITS: Final = "/org/freedesktop/systemd1/unit/"
_UNIT: Final = b"org.freedesktop.systemd1.Unit"
_SERVICE: Final = b"org.freedesktop.systemd1.Service"
_SYSTEMD: Final = b"org.freedesktop.systemd1"
_PROPERTY: Final = (c_void_p, c_char_p, c_char_p, c_char_p, c_char_p, c_void_p)
"""Arguments: bus, destination, path, interface, member, and room for an error that is not used."""


class Systemd(Library, soname="libsystemd.so.0", package="libsystemd0"):
    """Source: sd-bus(3)."""

    sd_bus_flush_close_unref = Function(c_void_p, c_void_p)
    sd_bus_get_property_string = Function(c_int, *_PROPERTY, POINTER(c_char_p), failure=negative)
    sd_bus_get_property_trivial = Function(
        c_int, *_PROPERTY, c_char, POINTER(c_uint32), failure=negative
    )
    sd_bus_new = Function(c_int, POINTER(c_void_p), failure=negative)
    sd_bus_set_address = Function(c_int, c_void_p, c_char_p, failure=negative)
    sd_bus_start = Function(c_int, c_void_p, failure=negative)


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
    """Return the unit, which systemd loads if need be. Raises: OSError if it does not answer."""
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
    """Yield a connection to systemd. Raises: OSError."""
    if not socket.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(socket))
    bus = c_void_p()
    Systemd.sd_bus_new(byref(bus))
    try:
        Systemd.sd_bus_set_address(bus, f"unix:path={socket}".encode())
        Systemd.sd_bus_start(bus)
        yield bus
    finally:
        Systemd.sd_bus_flush_close_unref(bus)


def _text(bus: Any, path: bytes, member: bytes) -> str:
    value = c_char_p()
    Systemd.sd_bus_get_property_string(bus, _SYSTEMD, path, _UNIT, member, None, byref(value))
    text = (value.value or b"").decode(errors="replace")
    Libc.free(value)
    return text


def _main_pid(bus: Any, path: bytes) -> int:
    value = c_uint32()
    Systemd.sd_bus_get_property_trivial(
        bus, _SYSTEMD, path, _SERVICE, b"MainPID", None, c_char(b"u"), byref(value)
    )
    return value.value
