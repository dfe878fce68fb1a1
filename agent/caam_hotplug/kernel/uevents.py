"""Events of block devices from netlink: the kernel's own, and udev's.

The kernel's message is `ACTION@DEVPATH` and then KEY=VALUE, each ended by a NUL. udev's has a
header instead of the first of these, which says where the rest begins. Source: kobject_uevent_env
in lib/kobject_uevent.c; monitor_netlink_header in systemd's device-monitor.c.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from caam_hotplug.kernel.sysfs import Source

log = logging.getLogger(__name__)

KERNEL_GROUP: Final = 1
UDEV_GROUP: Final = 2
_NETLINK_KOBJECT_UEVENT: Final = 15
"""From linux/netlink.h; Python has no name for it."""
_SO_RCVBUFFORCE: Final = 33
_BUFFER: Final = 16 << 20
"""Room for a storm of events. It takes memory only while it is used."""
_EVENT_MAX_BYTES: Final = 8192
"""systemd's limit; the kernel's own events have 2048 and a header (UEVENT_BUFFER_SIZE)."""
_UDEV_PREFIX: Final = b"libudev\0"
_UDEV_HEADER: Final = struct.Struct("=8s4sIII")
"""Prefix, magic, and in bytes: length of the header, where the properties begin, their length."""
_UDEV_MAGIC: Final = bytes.fromhex("feedcafe")
_UNKNOWN_FORM: Final = (
    "a report has a form that is not known, and is not read: it begins with %s; if it is "
    'udev\'s, media are served late; `source = "kernel"` serves them without udev'
)
_CREDENTIALS: Final = struct.Struct("=iII")
"""struct ucred: process, user, group (unix(7))."""
_ROOT: Final = 0
_MAPPING: Final = re.compile(rb"\0DEVPATH=/devices/virtual/block/(dm-\d+)\0")
"""With both NULs: a label may have any other byte."""
_TRUNCATED: Final = int(socket.MSG_TRUNC)
"""A number: Python makes a value of the enumeration at each `&`, for about the price of a read."""
_SO_ATTACH_FILTER: Final = 26
_ONLY_BLOCK: Final = b"".join(
    struct.pack("=HBBI", *instruction)
    for instruction in (
        (0x20, 0, 0, 24),  # load the word at 24 of udev's header, a hash of the subsystem
        (0x15, 0, 1, 0xF0031DB7),  # is it MurmurHash2 of "block"? Else skip one instruction
        (0x06, 0, 0, 0xFFFFFFFF),  # take the message whole
        (0x06, 0, 0, 0),  # leave it
    )
)
"""A filter for the socket, so that a keyboard does not wake the agent (bpf.rst,
sd_device_monitor_filter_update in systemd's device-monitor.c)."""
_LISTEN_FDS_START: Final = 3
_SOURCES: Final[Mapping[int, Source]] = {
    KERNEL_GROUP: "kernel",
    UDEV_GROUP: "udev",
}


@dataclass(frozen=True, slots=True)
class Uevent:
    """An event of a block device."""

    action: str
    name: str
    """The device's kernel name, as in /sys/class/block."""
    properties: Mapping[str, str]
    """Those that are text: kernels before 6.4 report a partition's name in bytes of no encoding
    (utf16_le_to_7bit in block/partitions/efi.c)."""


def handed_sockets() -> dict[Source, int]:
    """Take over the event sockets that the service manager has opened, by their source.

    The service has a network namespace of its own, without udev's events, and no right to buffers
    that are large enough for a storm. A socket has both from the process that made it. Source:
    sd_listen_fds(3); the variables are removed as it says.
    """
    count, whose = os.environ.pop("LISTEN_FDS", ""), os.environ.pop("LISTEN_PID", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if not count.isdecimal() or whose != str(os.getpid()):
        return {}
    found: dict[Source, int] = {}
    for fileno in range(_LISTEN_FDS_START, _LISTEN_FDS_START + int(count)):
        os.set_inheritable(fileno, False)
        os.set_blocking(fileno, False)
        with socket.socket(fileno=fileno) as opened:
            if opened.family == socket.AF_NETLINK:
                _, group = opened.getsockname()
                if group in _SOURCES:
                    found[_SOURCES[group]] = opened.detach()
    return found


class Uevents:
    """A socket of events. Synchronization: loop only."""

    def __init__(self, group: int, handed: int | None = None) -> None:
        """`handed`: a socket of this group, which this object closes."""
        self._group = group
        self._is_unknown_said = False
        """Whether it is said that a message has an unknown form."""
        self.mapping_changed: Callable[[str], None] = lambda _name: None
        """Called with the kernel's name of a mapping that it has changed or removed."""
        self.disk_reported: Callable[[Uevent], None] = lambda _event: None
        """Called with each event of a whole disk, before it is returned."""
        if handed is not None:
            self._socket = socket.socket(fileno=handed)
        else:
            kinds = socket.SOCK_RAW | socket.SOCK_CLOEXEC
            self._socket = socket.socket(socket.AF_NETLINK, kinds, _NETLINK_KOBJECT_UEVENT)
            with suppress(PermissionError):
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
            self._socket.bind((0, group))
        if group == UDEV_GROUP:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
            program = ctypes.create_string_buffer(_ONLY_BLOCK)
            length, address = len(_ONLY_BLOCK) // 8, ctypes.addressof(program)
            attached = struct.pack("@HP", length, address)
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, attached)
        self._socket.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor that is readable when `read` has something."""
        return self._socket.fileno()

    def close(self) -> None:
        """Stop receiving events."""
        self._socket.close()

    def read(self, most: int) -> Iterator[Uevent | None]:
        """Read at most so many events; yield those of block devices other than mappings.

        None where some were lost (ENOBUFS in netlink(7)), or the end of one.
        """
        room = socket.CMSG_SPACE(_CREDENTIALS.size)
        for _ in range(most):
            try:
                message, ancillary, flags, sender = self._socket.recvmsg(_EVENT_MAX_BYTES, room)
            except BlockingIOError:
                return
            except OSError:
                yield None
                continue
            if flags & _TRUNCATED:
                yield None
                continue
            if b"\0SUBSYSTEM=block\0" not in message:
                continue
            if not self._is_trusted(sender, ancillary):
                continue
            if (mapping := _MAPPING.search(message)) is not None:
                if not message.startswith(b"add@"):
                    self.mapping_changed(mapping[1].decode())
            elif (event := self._known(message)) is not None:
                if event.properties.get("DEVTYPE") == "disk":
                    self.disk_reported(event)
                yield event

    def _known(self, message: bytes) -> Uevent | None:
        """Parse the message, and say once that one has an unknown form."""
        has_form = self._group == KERNEL_GROUP or message.startswith(_UDEV_PREFIX)
        event = parsed(message) if has_form else None
        if event is None and not self._is_unknown_said:
            self._is_unknown_said = True
            log.warning(_UNKNOWN_FORM, message[: _UDEV_HEADER.size].hex())
        return event

    def _is_trusted(self, sender: tuple[int, int], ancillary: list[tuple[int, int, bytes]]) -> bool:
        """Return whether the kernel, or a process of root's, has sent it; others can, too."""
        port, group = sender
        if self._group == KERNEL_GROUP:
            return port == 0
        return group == UDEV_GROUP and any(
            _CREDENTIALS.unpack(content)[1] == _ROOT
            for level, kind, content in ancillary
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS)
            and len(content) == _CREDENTIALS.size
        )


def parsed(message: bytes) -> Uevent | None:
    """Parse a message; return None for an unknown form."""
    if message.startswith(_UDEV_PREFIX):
        if len(message) < _UDEV_HEADER.size:
            return None
        _, magic, _, begin, length = _UDEV_HEADER.unpack_from(message)
        if magic != _UDEV_MAGIC:
            return None
        message = message[begin : begin + length]
    properties = dict([text.split("=", 1) for text in _texts(message) if "=" in text])
    name = os.path.basename(properties.get("DEVPATH", ""))
    return Uevent(properties.get("ACTION", ""), name, properties) if name else None


def _texts(message: bytes) -> list[str]:
    try:
        return message.decode().split("\0")
    except UnicodeDecodeError:
        return [text for raw in message.split(b"\0") if (text := _text(raw)) is not None]


def _text(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None
