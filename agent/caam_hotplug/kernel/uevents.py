"""The kernel's own events of block devices, as they come from its socket.

Source: Documentation/ABI/testing/sysfs-uevent, kobject_uevent_env in lib/kobject_uevent.c: one
message for each event, `ACTION@DEVPATH` and then KEY=VALUE, each ended by a NUL.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

GROUP: Final = 1
"""Multicast group of the kernel's own events; udev's is 2 (device-monitor.c in systemd)."""
_NETLINK_KOBJECT_UEVENT: Final = 15
"""Of linux/netlink.h; Python has no name for it."""
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 16 << 20
"""A storm of media fits in. It takes memory only while it is used."""
_EVENT_MAX_BYTES: Final = 8192
"""A uevent has at most UEVENT_BUFFER_SIZE bytes and its header (linux/kobject.h)."""
_KERNEL: Final = 0
"""The sender's port in an event of the kernel's; any process may send to a group otherwise."""


@dataclass(frozen=True, slots=True)
class Uevent:
    """What the kernel has told of a block device."""

    action: str
    name: str
    """The kernel's name of the device, as in /sys/class/block."""
    partlabel: str | None
    """PARTNAME; None where there is none, or in bytes of no encoding, as before Linux 6.4."""


class Uevents:
    """A socket of the kernel's events. Synchronization: loop only."""

    def __init__(self, handed: int | None = None) -> None:
        """`handed`: a socket that is bound already; ours from now on."""
        if handed is not None:
            self._socket = socket.socket(fileno=handed)
        else:
            kinds = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            self._socket = socket.socket(socket.AF_NETLINK, kinds, _NETLINK_KOBJECT_UEVENT)
            with suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.bind((0, GROUP))
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """When it is readable, `read` has something to give."""
        return self._socket.fileno()

    def close(self) -> None:
        """Events are no longer received."""
        self._socket.close()

    def read(self, most: int) -> Iterator[Uevent | None]:
        """At most so many events that wait, those of other devices among them but not given.

        None where some were lost (ENOBUFS in netlink(7)).
        """
        for _ in range(most):
            try:
                message, (port, _) = self._socket.recvfrom(_EVENT_MAX_BYTES)
            except BlockingIOError:
                return
            except OSError:
                yield None
                continue
            event = parsed(message) if port == _KERNEL else None
            if event is not None:
                yield event


def parsed(message: bytes) -> Uevent | None:
    """What a message tells of a block device; None if it is about anything else."""
    if b"\0SUBSYSTEM=block\0" not in message:
        return None
    told = dict(pair.split(b"=", 1) for pair in message.split(b"\0")[1:] if b"=" in pair)
    path = told.get(b"DEVPATH", b"")
    return Uevent(
        action=told.get(b"ACTION", b"").decode(errors="replace"),
        name=os.path.basename(path).decode(errors="replace"),
        partlabel=_text(told.get(b"PARTNAME")),
    )


def _text(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None
