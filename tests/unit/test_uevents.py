"""What the kernel's messages say, and whose messages are believed."""

from __future__ import annotations

import os
import socket
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.kernel.uevents import Uevent, Uevents, parsed

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
    """As the kernel makes it: a header, then the properties."""
    told = {**PARTITION, **changed}
    pairs = [f"{name}=".encode() + value for name, value in told.items()]
    return b"\0".join([told["ACTION"] + b"@" + told["DEVPATH"], *pairs, b""])


def test_a_partitions_event_is_read() -> None:
    assert parsed(message()) == Uevent("add", "sda1", "cartridge-01")


def test_a_label_in_utf_8_is_text_and_one_in_no_encoding_is_not_known() -> None:
    assert parsed(message(PARTNAME="Donn\u00e9es".encode())) == Uevent(
        "add", "sda1", "Donn\u00e9es"
    )
    assert parsed(message(PARTNAME=b"Donn\xe9es")) == Uevent("add", "sda1", None)


def test_a_label_with_equals_signs_stays_whole() -> None:
    assert parsed(message(PARTNAME=b"a=b=SUBSYSTEM=net")) == Uevent(
        "add", "sda1", "a=b=SUBSYSTEM=net"
    )


def test_events_of_anything_else_are_none() -> None:
    assert parsed(message(SUBSYSTEM=b"bdi")) is None
    assert parsed(message(SUBSYSTEM=b"blockade")) is None
    assert parsed(b"") is None


@given(st.binary())
def test_any_bytes_are_an_event_or_none(told: bytes) -> None:
    for raw in (told, b"\0SUBSYSTEM=block\0" + told):
        found = parsed(raw)
        assert found is None or "/" not in found.name


def test_an_event_that_a_process_has_made_up_is_not_believed() -> None:
    with (
        closing(Uevents()) as uevents,
        socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15) as liar,
    ):
        port, _ = uevents._socket.getsockname()
        liar.sendto(message(), (port, 0))
        assert list(uevents.read(8)) == []


def test_a_socket_that_was_handed_over_is_read_without_waiting() -> None:
    handed = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 15)
    handed.bind((0, 1))
    with closing(Uevents(handed.detach())) as uevents:
        assert not os.get_blocking(uevents.fileno())
        assert [event for event in uevents.read(8) if event is None] == []


def test_lost_events_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Overflown:
        def __init__(self) -> None:
            self.answers: list[Exception] = [OSError(105, "No buffer space"), BlockingIOError()]

        def recvfrom(self, _most: int) -> tuple[bytes, tuple[int, int]]:
            raise self.answers.pop(0)

        def close(self) -> None: ...

    with closing(Uevents()) as uevents:
        uevents._socket.close()
        monkeypatch.setattr(uevents, "_socket", Overflown())
        assert list(uevents.read(8)) == [None]
