"""What the kernel's messages say, and whose messages are believed."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import pytest
import pyudev
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.kernel.uevents import KERNEL_GROUP, UDEV_GROUP, Uevents, parsed

PARTITION = {
    "ACTION": b"add",
    "DEVPATH": b"/devices/pci0/usb1/1-1/host0/block/sda/sda1",
    "SUBSYSTEM": b"block",
    "MAJOR": b"8",
    "MINOR": b"1",
    "DEVNAME": b"sda1",
    "DEVTYPE": b"partition",
    "DISKSEQ": b"9",
    "PARTN": b"1",
    "PARTNAME": b"cartridge-01",
    "SEQNUM": b"1234",
}


def message(**changed: bytes) -> bytes:
    """Make a message as the kernel does: a header, then the properties."""
    properties = {**PARTITION, **changed}
    pairs = [f"{name}=".encode() + value for name, value in properties.items()]
    return b"\0".join([properties["ACTION"] + b"@" + properties["DEVPATH"], *pairs, b""])


BLOCK = 0xF0031DB7
"""MurmurHash2 of the subsystem's name, which udevd sends with each event."""


def from_udev(
    magic: bytes = b"\xfe\xed\xca\xfe", subsystem: int = BLOCK, **changed: bytes
) -> bytes:
    """Make a message as udevd does: a header, then the properties."""
    properties = message(**changed).split(b"\0", 1)[1]
    sizes = struct.pack("=III", 40, 40, len(properties))
    hashes = struct.pack(">IIII", subsystem, 0, 0, 0)
    return b"libudev\0" + magic + sizes + hashes + properties


class Messages(socket.socket):
    """A socket that has messages from the kernel."""

    def __init__(self, messages: Iterable[bytes]) -> None:
        super().__init__(socket.AF_UNIX)
        self._messages = iter(messages)

    def recvmsg(self, *_sizes: int) -> Any:
        """Return the next message as the kernel sends it, which is no process."""
        for text in self._messages:
            return text, [], 0, (0, KERNEL_GROUP)
        raise BlockingIOError


def test_a_partitions_event_is_read_the_kernels_and_udevs_alike() -> None:
    for raw in (message(), from_udev()):
        event = parsed(raw)
        assert event is not None
        assert (event.action, event.name) == ("add", "sda1")
        assert event.properties["PARTNAME"] == "cartridge-01"
        assert event.properties["DISKSEQ"] == "9"


def test_a_label_in_utf_8_is_text_and_one_in_no_encoding_hides_nothing_else() -> None:
    spelled, raw = (
        parsed(message(PARTNAME="Donn\u00e9es".encode())),
        parsed(message(PARTNAME=b"\xe9")),
    )
    assert spelled is not None
    assert raw is not None
    assert spelled.properties["PARTNAME"] == "Donn\u00e9es"
    assert "PARTNAME" not in raw.properties
    assert raw.properties["DISKSEQ"] == "9"


def test_a_label_with_equals_signs_stays_whole() -> None:
    event = parsed(message(PARTNAME=b"a=b=SUBSYSTEM=net"))
    assert event is not None
    assert event.properties["PARTNAME"] == "a=b=SUBSYSTEM=net"


@pytest.mark.parametrize("damaged", [b"libudev\0", from_udev(magic=b"\xfe\xed\xca\xff")])
def test_what_udevd_would_not_send_is_no_event(damaged: bytes) -> None:
    assert parsed(damaged) is None


@given(st.binary())
def test_any_bytes_are_an_event_or_none(raw: bytes) -> None:
    for text in (raw, b"libudev\0\xfe\xed\xca\xfe" + raw, message() + raw):
        found = parsed(text)
        assert found is None or "/" not in found.name


@pytest.mark.parametrize("group", [KERNEL_GROUP, UDEV_GROUP])
def test_an_event_that_a_process_sends_to_the_agent_alone_is_not_trusted(group: int) -> None:
    with closing(Uevents(group)) as uevents, netlink() as liar:
        liar.sendto(message() if group == KERNEL_GROUP else from_udev(), (port_of(uevents), 0))
        assert list(uevents.read(8)) == []


def test_an_event_of_udevs_is_trusted_if_root_has_sent_it_to_all() -> None:
    with closing(Uevents(UDEV_GROUP)) as uevents, netlink() as udevd:
        udevd.sendto(from_udev(DEVPATH=b"/devices/x/of-a-test"), (0, UDEV_GROUP))
        assert "of-a-test" in {event.name for event in uevents.read(8) if event}


def test_udevs_events_of_other_subsystems_do_not_wake_the_agent() -> None:
    with closing(Uevents(UDEV_GROUP)) as uevents, netlink() as udevd:
        udevd.sendto(from_udev(subsystem=0x12345678), (0, UDEV_GROUP))
        udevd.sendto(from_udev(), (0, UDEV_GROUP))
        names = [event.name for event in uevents.read(1) if event]
        assert names == ["sda1"]


def test_events_of_mappings_are_left_out() -> None:
    path = b"/devices/virtual/block/dm-3"
    with closing(Uevents(UDEV_GROUP)) as uevents, netlink() as udevd:
        udevd.sendto(from_udev(DEVPATH=path), (0, UDEV_GROUP))
        assert list(uevents.read(8)) == []


def test_a_mapping_that_the_kernel_changes_or_removes_is_named() -> None:
    changed: list[str] = []
    path = b"/devices/virtual/block/dm-3"
    actions = (b"add", b"change", b"remove")
    uevents = Uevents(KERNEL_GROUP)
    uevents.close()
    uevents.mapping_changed = changed.append
    uevents._socket = Messages(message(ACTION=action, DEVPATH=path) for action in actions)
    with closing(uevents):
        assert list(uevents.read(8)) == []
    assert changed == ["dm-3", "dm-3"]


def test_a_label_that_looks_like_a_mappings_path_hides_nothing() -> None:
    label = b"DEVPATH=/devices/virtual/block/dm-0"
    with closing(Uevents(UDEV_GROUP)) as uevents, netlink() as udevd:
        udevd.sendto(from_udev(PARTNAME=label), (0, UDEV_GROUP))
        assert [event.name for event in uevents.read(8) if event] == ["sda1"]


def test_a_message_that_does_not_fit_counts_as_lost() -> None:
    with closing(Uevents(UDEV_GROUP)) as uevents, netlink() as udevd:
        udevd.sendto(from_udev(X=b"y" * 9000), (0, UDEV_GROUP))
        assert list(uevents.read(8)) == [None]


def test_the_hash_is_the_one_that_udevd_sends() -> None:
    monitor = pyudev.Monitor.from_netlink(pyudev.Context())
    monitor.filter_by("block")
    monitor.start()
    program = ctypes.create_string_buffer(8 * 64)
    count = ctypes.c_uint32(64)
    found = ctypes.CDLL(None).getsockopt(monitor.fileno(), 1, 26, program, ctypes.byref(count))
    assert found == 0
    values = [struct.unpack_from("=HBBI", program, 8 * n)[3] for n in range(count.value)]
    assert BLOCK in values


def test_an_event_of_udevs_that_another_user_has_sent_is_not_trusted() -> None:
    with closing(Uevents(UDEV_GROUP)) as uevents:
        credentials = struct.pack("=iII", 1, 1000, 0)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, credentials)]
        assert not uevents._is_trusted((4711, UDEV_GROUP), ancillary)
        assert not uevents._is_trusted((4711, UDEV_GROUP), [])


def netlink() -> socket.socket:
    """Open a socket of the events' netlink."""
    return socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)


def port_of(uevents: Uevents) -> int:
    port, _ = uevents._socket.getsockname()
    return int(port)


def test_a_socket_that_was_handed_over_is_read_without_waiting() -> None:
    handed = netlink()
    handed.bind((0, KERNEL_GROUP))
    with closing(Uevents(KERNEL_GROUP, handed.detach())) as uevents:
        assert not os.get_blocking(uevents.fileno())
        assert None not in list(uevents.read(8))


def test_lost_events_are_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflown:
        def __init__(self) -> None:
            self.answers: list[Exception] = [OSError(105, "No buffer space"), BlockingIOError()]

        def recvmsg(self, _most: int, _room: int) -> None:
            raise self.answers.pop(0)

        def close(self) -> None: ...

    with closing(Uevents(KERNEL_GROUP)) as uevents:
        uevents._socket.close()
        monkeypatch.setattr(uevents, "_socket", Overflown())
        assert list(uevents.read(8)) == [None]
