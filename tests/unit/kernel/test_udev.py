from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace

import pytest
import pyudev
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.kernel import device_users, sysfs, udev, udev_database, uevents
from caam_hotplug.model import (
    Announced,
    Appeared,
    Bus,
    DeviceNumber,
    DevType,
    Disappeared,
    Sectors,
    Volume,
    VolumeId,
)


def encoded(text: str) -> str:
    """Encode as libblkid does a label: plain characters stay, other bytes become `\\xNN`."""
    plain = b"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789#+-.:=@_"
    return "".join(chr(b) if b in plain else f"\\x{b:02x}" for b in text.encode())


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_libblkid_encodes_comes_back_as_it_was(text: str) -> None:
    assert sysfs.decoded(encoded(text)) == text


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
    assert sysfs.decoded(value) == text


@pytest.mark.parametrize("value", ["\\", "\\x", "\\x2", "\\xg0", "\\n", "\\\\y20", "x2f"])
def test_what_is_no_escape_stays(value: str) -> None:
    assert sysfs.decoded(value) == value


@pytest.mark.parametrize("value", ["a\\xff", "a\\xc3", "a\udcff"])
def test_bytes_that_are_no_utf8_become_the_replacement_character(value: str) -> None:
    assert sysfs.decoded(value) == "a\ufffd"


def test_no_volume_is_at_a_name_that_the_kernel_does_not_know() -> None:
    assert sysfs.present_id("no-such-device") is None


class Reported:
    """A device whose partition's name the kernel reports in bytes of no encoding."""

    class properties(dict[str, str]):
        def __getitem__(self, name: str) -> str:
            value = super().__getitem__(name)
            return value.encode("latin-1").decode()


def test_a_property_that_is_no_text_hides_no_other_one() -> None:
    device = Reported()
    device.properties = device.properties(ID_PART_ENTRY_NAME="Donn\xe9es", ID_PATH="7")  # type: ignore[assignment]
    assert udev_database.properties(device) == {"ID_PATH": "7"}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("database", "is_stale"),
    [
        ({names.UDEV_DISKSEQ: "7", "DISKSEQ": "7"}, False),
        ({names.UDEV_DISKSEQ: "6", "DISKSEQ": "7"}, True),
        ({"DEVLINKS": "/dev/disk/by-id/x /dev/disk/by-diskseq/7", "DISKSEQ": "7"}, False),
        ({"DEVLINKS": "/dev/disk/by-diskseq/6 /dev/disk/by-id/x", "DISKSEQ": "7"}, True),
        ({"DEVLINKS": "/dev/disk/by-diskseq/7-part1", "DISKSEQ": "7"}, False),
        ({"DISKSEQ": "7"}, False),
        ({"DISKSEQ": "6"}, False),  # it is what the kernel says, and read a moment ago
    ],
)
def test_udevs_database_is_of_another_medium_if_it_says_so(
    database: dict[str, str], is_stale: bool
) -> None:
    device = Reported()
    device.properties = device.properties(database)  # type: ignore[assignment]
    properties = udev_database.properties(device)  # type: ignore[arg-type]
    assert udev_database.is_of_another(properties, VolumeId(7, 1)) is is_stale


class Listed(Reported):
    """A device of which udev's database has a label, and that of another medium."""

    sys_name = "sda1"
    is_initialized = True
    properties = Reported.properties({names.UDEV_DISKSEQ: "6", "ID_PART_ENTRY_NAME": "before"})  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("source", "announces"), [("udev", True), ("udev", False), ("kernel", True)]
)
def test_a_medium_whose_predecessor_is_in_udevs_database_is_listed_without_that(
    monkeypatch: pytest.MonkeyPatch, source: sysfs.Source, *, announces: bool
) -> None:
    def at(_name: str, properties: dict[str, str], by: str) -> Volume:
        label = properties.get("ID_PART_ENTRY_NAME")
        return replace(volume(7), partlabel=label, identified=by == "udev", awaits_udev=False)

    monkeypatch.setattr(sysfs, "volume_at", at)
    with closing(udev.Devices(source)) as devices:
        monkeypatch.setattr(sysfs, "block_names", lambda: ["sda1"])
        monkeypatch.setattr(pyudev.Devices, "from_name", lambda *_: Listed())
        monkeypatch.setattr(devices, "_may_announce", lambda: announces)
        found = [event.volume for event in devices.present()]
        is_awaited = devices.next_overdue is not None
    seen = replace(volume(7), awaits_udev=source == "udev")
    assert found == ([seen] if announces else [])
    assert is_awaited is (source == "udev")


@pytest.mark.parametrize("said", [{"DISKSEQ": "6"}, {names.UDEV_DISKSEQ: "6", "DISKSEQ": "7"}])
def test_an_event_is_of_another_medium_if_any_number_in_it_is(said: dict[str, str]) -> None:
    assert udev_database.is_of_another(said, VolumeId(7, 1))
    assert not udev_database.is_of_another(dict.fromkeys(said, "7"), VolumeId(7, 1))


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
    monkeypatch.setattr(uevents, "_LISTEN_FDS_START", first)
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


def test_the_service_managers_sockets_are_distinguished_by_their_group(
    handed: list[socket.socket],
) -> None:
    kernel, from_udev, _ = handed
    found = uevents.handed_sockets()
    assert {source: inode(fileno) for source, fileno in found.items()} == {
        "kernel": inode(kernel.fileno()),
        "udev": inode(from_udev.fileno()),
    }
    assert not any(os.get_inheritable(fileno) for fileno in found.values())
    assert not [name for name in os.environ if name.startswith("LISTEN_")]


@pytest.mark.usefixtures("handed")
def test_sockets_meant_for_another_process_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_PID", "1")
    assert uevents.handed_sockets() == {}


def test_devices_listen_on_the_sockets_that_they_were_handed(handed: list[socket.socket]) -> None:
    found = uevents.handed_sockets()
    with closing(udev.Devices("udev", found)) as devices:
        listened = {inode(fileno) for fileno in devices.readers()}
    assert listened == {inode(opened.fileno()) for opened in handed[:2]}


def test_a_handed_socket_that_is_not_used_is_closed(handed: list[socket.socket]) -> None:
    found = uevents.handed_sockets()
    with closing(udev.Devices("kernel", found)) as devices:
        assert [inode(f) for f in devices.readers()] == [inode(handed[0].fileno())]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(found["udev"])


class Events:
    """A socket with these events."""

    def __init__(self) -> None:
        self.events: list[uevents.Uevent] = []

    def read(self, _most: int) -> list[uevents.Uevent]:
        events, self.events = self.events, []
        return events

    def close(self) -> None: ...


Early = tuple[udev.Devices, Events, dict[str, Volume]]


@pytest.fixture
def early(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Early]:
    """Devices that announce, their kernel's events, and what sits where."""
    there: dict[str, Volume] = {}
    monkeypatch.setattr(sysfs, "present_id", lambda name: there[name].id if name in there else None)
    monkeypatch.setattr(sysfs, "announced_at", lambda name, _label: there.get(name))
    monkeypatch.setattr(sysfs, "volume_at", lambda name, *_: there.get(name))
    with closing(udev.Devices("udev")) as devices:
        kernel_events = Events()
        devices._kernel.close()
        monkeypatch.setattr(devices, "_kernel", kernel_events)
        monkeypatch.setattr(devices, "_may_announce", lambda: True)
        yield devices, kernel_events, there


def volume(diskseq: int) -> Volume:
    return Volume(
        VolumeId(diskseq, 1), "sda1", DeviceNumber(8, 1), DevType.PARTITION, Sectors(8), Bus.USB,
        removable=True, read_only=False, identified=False, awaits_udev=True,
    )  # fmt: skip


def test_a_medium_that_is_swapped_before_udev_reports_it_has_left(
    early: Early,
) -> None:
    devices, kernel_events, there = early
    there["sda1"] = volume(1)
    kernel_events.events = [uevents.Uevent("add", "sda1", {})]
    assert devices.read_kernel() == [Announced(volume(1))]
    there["sda1"] = volume(2)
    kernel_events.events = [uevents.Uevent("remove", "sda1", {}), uevents.Uevent("add", "sda1", {})]
    assert devices.read_kernel() == [Disappeared("sda1"), Announced(volume(2))]


def test_a_card_that_is_changed_before_udev_reports_its_reader_has_left(
    early: Early,
) -> None:
    devices, kernel_events, there = early
    there["sda1"] = volume(1)
    kernel_events.events = [uevents.Uevent("add", "sda1", {})]
    assert devices.read_kernel() == [Announced(volume(1))]
    there["sda"] = replace(volume(2), id=VolumeId(2, 0), name="sda")
    kernel_events.events = [uevents.Uevent("change", "sda", {})]
    assert devices.read_kernel() == [Disappeared("sda1")]
    kernel_events.events = [uevents.Uevent("change", "sda", {})]
    assert devices.read_kernel() == []


def test_a_disk_that_is_locked_is_not_served_without_udev_however_long_it_takes(
    early: Early, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices, kernel_events, there = early
    there["sda1"] = volume(1)
    kernel_events.events = [uevents.Uevent("add", "sda1", {})]
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 0.0)
    monkeypatch.setattr(device_users, "is_locked", lambda _name: True)
    devices.read_kernel()
    assert devices.overdue() == []
    assert devices.next_overdue is not None
    monkeypatch.setattr(device_users, "is_locked", lambda _name: False)
    assert devices.overdue() == [Appeared(volume(1))]


def test_what_is_no_medium_is_not_waited_for(
    early: Early,
) -> None:
    devices, _, _ = early
    for name in ("dm-3", "sr0", "zram0"):
        devices._await_udev(name)
    assert devices.next_overdue is None


@pytest.mark.parametrize(
    ("name", "disk", "is_one"),
    [
        ("sda1", "sda", True),
        ("sda12", "sda", True),
        ("sdaa1", "sda", False),
        ("sda", "sda", False),
        ("mmcblk0p1", "mmcblk0", True),
        ("mmcblk0boot0", "mmcblk0", False),
        ("mmcblk01", "mmcblk0", False),
        ("nvme0n1p2", "nvme0n1", True),
    ],
)
def test_partitions_are_known_by_their_names(name: str, disk: str, is_one: bool) -> None:
    assert names.is_partition_of(name, disk) is is_one
