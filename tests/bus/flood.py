"""Flood the agent with requests to read, as fast as the bus takes them: python3 tests/bus/flood.py

It needs nothing but Python, so that any user of a board can run it. It ends when it is killed.
Source: the D-Bus Specification.
"""

from __future__ import annotations

import argparse
import os
import select
import socket
import struct
from collections.abc import Iterator

NAME = "org.caamhotplug1"
PATH = "/org/caamhotplug1"
PROPERTIES = "org.freedesktop.DBus.Properties"
CALLS = {
    "introspect": ("org.freedesktop.DBus.Introspectable", "Introspect", ()),
    "ping": ("org.freedesktop.DBus.Peer", "Ping", ()),
    "objects": ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects", ()),
    "get": (PROPERTIES, "Get", (f"{NAME}.Manager", "Counters")),
    "all": (PROPERTIES, "GetAll", (f"{NAME}.Manager",)),
    "unknown": (PROPERTIES, "Get", (f"{NAME}.Manager", "Nothing")),
    "large": (PROPERTIES, "Get", ("x" * (8 << 20), "y")),
}
"""Interface, member and arguments of the requests, by the name of each."""
SYSTEM_BUS = "/run/dbus/system_bus_socket"
SENT_AT_ONCE = 64
_FIELDS = {"path": (1, b"o"), "interface": (2, b"s"), "member": (3, b"s"), "to": (6, b"s")}
_NO_REPLY = 1
_SERIAL_AT = 8


def text(value: str) -> bytes:
    """Return a string as a message has it."""
    return struct.pack("<I", len(value)) + value.encode() + b"\0"


def aligned(content: bytes, to: int) -> bytes:
    """Return the content with zeros up to a multiple of `to`."""
    return content + bytes(-len(content) % to)


def call(
    interface: str, member: str, arguments: tuple[str, ...], *, flags: int = 0,
    to: str = NAME, path: str = PATH,
) -> bytes:  # fmt: skip
    """Return a call with strings for arguments, without a body's end in the next message."""
    values = {"path": path, "interface": interface, "member": member, "to": to}
    fields = b""
    for name, value in values.items():
        code, kind = _FIELDS[name]
        fields = aligned(fields, 8) + bytes([code, 1]) + kind + b"\0" + text(value)
    if arguments:
        fields = aligned(fields, 8) + b"\x08\x01g\0" + bytes([len(arguments)])
        fields += b"s" * len(arguments) + b"\0"
    body = b""
    for argument in arguments:
        body = aligned(body, 4) + text(argument)
    head = struct.pack("<BBBBIII", ord("l"), 1, flags, 1, len(body), 1, len(fields))
    return aligned(head + fields, 8) + body


def connected(address: str) -> socket.socket:
    """Return a connection to the bus that may send."""
    bus = socket.socket(socket.AF_UNIX)
    bus.connect(address)
    bus.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
    assert bus.recv(4096).startswith(b"OK ")
    bus_itself = {"to": "org.freedesktop.DBus", "path": "/org/freedesktop/DBus"}
    bus.sendall(call("org.freedesktop.DBus", "Hello", (), **bus_itself))
    return bus


def bursts(kinds: list[str], flags: int) -> Iterator[memoryview]:
    """Yield the requests again and again, each with a serial number of its own."""
    messages = [call(*CALLS[kind], flags=flags) for kind in kinds]
    messages *= 1 if sum(map(len, messages)) > 1 << 20 else SENT_AT_ONCE
    burst = bytearray(b"".join(messages))
    serial = 1
    while True:
        at = 0
        for message in messages:
            serial = serial % 0xFFFFFFFF + 1
            struct.pack_into("<I", burst, at + _SERIAL_AT, serial)
            at += len(message)
        yield memoryview(burst)


def flood(address: str, kinds: list[str], *, is_answered: bool, reads: bool) -> None:
    """Send for ever. `reads`: whether the replies are taken from the bus."""
    bus = connected(address)
    bus.setblocking(False)
    burst = bursts(kinds, 0 if is_answered else _NO_REPLY)
    unsent = next(burst)
    while True:
        wait_for = [bus] if reads else []
        readable, writable, _ = select.select(wait_for, [bus], [])
        if readable and not bus.recv(1 << 20):
            return
        if writable:
            unsent = unsent[bus.send(unsent) :] or next(burst)


def main() -> None:
    """Flood as the arguments say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=list(CALLS), help=f"of {', '.join(CALLS)}")
    parser.add_argument("--bus", default=SYSTEM_BUS, help="path of its socket")
    parser.add_argument("--unanswered", action="store_true", help="ask for no reply")
    parser.add_argument("--unread", action="store_true", help="leave the replies to the bus")
    parsed = parser.parse_args()
    flood(parsed.bus, parsed.kinds, is_answered=not parsed.unanswered, reads=not parsed.unread)


if __name__ == "__main__":
    main()
