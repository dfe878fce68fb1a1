from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.kernel import udev, volumes


def encoded(text: str) -> str:
    """As libblkid encodes a label: plain characters stay, other bytes become `\\xNN`."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#+-.:=@_"
    return "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in text.encode())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_libblkid_encodes_comes_back_as_it_was(text: str) -> None:
    assert volumes.decoded(encoded(text)) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("cartridge", "cartridge"),
        ("my\\x20data", "my data"),
        ("a\\x2f..\\x2Fb", "a/../b"),
        ("\\xc3\\xbcber", "über"),
        ("über", "über"),
        ("\\x5cx2f", "\\x2f"),  # a backslash that is the label's own is decoded once
        ("Ultra\\x20\\x20\\x20", "Ultra   "),
        ("a\\x0ab\\x00", "a\nb\0"),
        ("", ""),
    ],
)
def test_a_value_is_decoded(value: str, text: str) -> None:
    assert volumes.decoded(value) == text


@pytest.mark.parametrize("value", ["\\", "\\x", "\\x2", "\\xg0", "\\n", "\\\\y20", "x2f"])
def test_what_is_no_escape_stays(value: str) -> None:
    assert volumes.decoded(value) == value


@pytest.mark.parametrize("value", ["a\\xff", "a\\xc3", "a\udcff"])
def test_bytes_that_are_no_utf8_become_the_replacement_character(value: str) -> None:
    assert volumes.decoded(value) == "a\ufffd"


def test_no_volume_sits_at_a_name_that_the_kernel_does_not_know() -> None:
    assert volumes.present_id("no-such-device") is None


class Told:
    """A device of which the kernel tells a partition's name in bytes of no encoding."""

    class properties(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            value = super().__getitem__(name)
            return value.encode("latin-1").decode()


def test_a_property_that_is_no_text_hides_no_other_one() -> None:
    told = Told()
    told.properties = told.properties(ID_PART_ENTRY_NAME="Donn\xe9es", DISKSEQ="7")  # type: ignore[assignment]
    assert udev._properties(told) == {"DISKSEQ": "7"}  # type: ignore[arg-type]


KOBJECT_UEVENT = 15
"""NETLINK_KOBJECT_UEVENT of linux/netlink.h; Python has no name for it."""


@pytest.fixture
def handed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """Sockets of events of both groups, and another, at the numbers from `first` on."""
    made = []
    for group in (1, 2):
        made.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, KOBJECT_UEVENT))
        made[-1].bind((0, group))
    made.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
    first = max(int(name) for name in os.listdir("/proc/self/fd")) + 10
    for number, opened in enumerate(made, first):
        os.dup2(opened.fileno(), number)
    monkeypatch.setattr(udev, "_LISTEN_FDS_START", first)
    monkeypatch.setenv("LISTEN_FDS", str(len(made)))
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDNAMES", "a:b:c")
    yield made
    for number in range(first, first + len(made)):
        with contextlib.suppress(OSError):
            os.close(number)
    for opened in made:
        opened.close()


def inode(fileno: int) -> int:
    return os.fstat(fileno).st_ino


def test_the_service_managers_sockets_are_told_apart_by_their_group(
    handed: list[socket.socket],
) -> None:
    kernel, from_udev, _ = handed
    found = udev.handed_sockets()
    assert {source: inode(fileno) for source, fileno in found.items()} == {
        "kernel": inode(kernel.fileno()),
        "udev": inode(from_udev.fileno()),
    }
    assert not any(os.get_inheritable(fileno) for fileno in found.values())
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


@pytest.mark.usefixtures("handed")
def test_sockets_meant_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    assert udev.handed_sockets() == {}


def test_devices_listen_on_the_sockets_that_they_were_handed(handed: list[socket.socket]) -> None:
    found = udev.handed_sockets()
    with closing(udev.Devices("udev", found)) as devices:
        listened = {inode(fileno) for fileno in devices.readers()}
    assert listened == {inode(opened.fileno()) for opened in handed[:2]}


def test_a_handed_socket_that_is_not_listened_to_is_closed(handed: list[socket.socket]) -> None:
    found = udev.handed_sockets()
    with closing(udev.Devices("kernel", found)) as devices:
        assert [inode(f) for f in devices.readers()] == [inode(handed[0].fileno())]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(found["udev"])
