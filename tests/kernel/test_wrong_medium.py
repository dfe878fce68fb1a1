"""No medium is taken for another: what the disk says counts, whatever was reported of it."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import udev
from caam_hotplug.kernel.udev_rules import UdevRules
from fakes.contract import until
from kernel.agents import Room, mappings
from kernel.cartridges import HELLO, TEXT
from kernel.test_early import DOES_NOT_WAIT, WAITS, has_heard_of_it
from kernel.test_lost_events import udevd_hanging
from kernel.witness import run


@contextmanager
def udevd_stopped() -> Iterator[None]:
    """Let udevd miss events, while all that it has reported before stays."""
    units = ("systemd-udevd-kernel.socket", "systemd-udevd.service")
    run("systemctl", "stop", *units)
    try:
        yield
    finally:
        run("systemctl", "start", *units)
        run("udevadm", "trigger", "--settle", "--subsystem-match=block")


without_udevd = pytest.mark.parametrize("udevd", [udevd_hanging, udevd_stopped])


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """An agent that does not wait long for udev."""
    monkeypatch.setattr(udev, "UDEV_PATIENCE_S", 1.0)


def set_waiting(room: Room, *, waits: bool) -> None:
    """Have the agent wait for udev, or not."""
    before, after = (DOES_NOT_WAIT, WAITS) if waits else (WAITS, DOES_NOT_WAIT)
    room.configuration.write_text(room.configuration.read_text().replace(before, after))


@without_udevd
@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.usefixtures("impatient")
def test_a_medium_that_came_without_udevd_is_not_taken_for_the_one_before(
    room: Room, udevd: Callable[[], AbstractContextManager[None]], *, waits: bool
) -> None:
    set_waiting(room, waits=waits)
    with room.medium.disposable():
        before = room.medium.partition
    room.medium.plug()
    room.medium.settle()
    with udevd():
        room.medium.pull()
        room.neighbour.plug()
        until(lambda: room.neighbour.is_plugged and os.path.exists(room.neighbour.partition))
        assert room.neighbour.partition == before
        room.agent.start()
        room.check_served(room.neighbour)
        assert not room.point().exists()
        assert len(mappings()) == 1
    run("udevadm", "settle")
    has_heard_of_it(room)
    assert (room.point(room.neighbour) / HELLO).read_bytes() == TEXT
    assert not room.point().exists()
    room.neighbour.pull()
    until(lambda: mappings() == [])


@without_udevd
def test_a_label_that_udev_has_not_read_again_is_read_from_the_disk(
    room: Room, udevd: Callable[[], AbstractContextManager[None]]
) -> None:
    room.medium.plug()
    room.medium.settle()
    disk = f"/dev/{room.medium.disk.name}"
    with udevd():
        run("sfdisk", "-q", "--no-tell-kernel", "--part-label", disk, "1", "cartridge-03")
        room.agent.start()
        room.agent.until_said("and udev reports 'cartridge-01'; what the disk says counts")
        room.agent.until_said("cartridge-03.*: mounted: at ")
        assert not room.point().exists()
    run("udevadm", "settle")
    has_heard_of_it(room)
    assert (room.mount_root / "cartridge-03" / HELLO).read_bytes() == TEXT
    room.agent.stop()
    run("sfdisk", "-q", "--no-tell-kernel", "--part-label", disk, "1", "cartridge-01")
    room.medium.pull()
    run("udevadm", "settle")


def test_a_medium_relabelled_while_it_is_mounted_stays_and_is_then_mounted_as_the_other(
    room: Room,
) -> None:
    room.agent.start()
    room.plug_and_check()
    run("udevadm", "settle")
    has_heard_of_it(room)
    disk = f"/dev/{room.medium.disk.name}"
    run("sfdisk", "-q", "--no-tell-kernel", "--part-label", disk, "1", "cartridge-03")
    run("udevadm", "settle")
    has_heard_of_it(room)
    room.check_still_mounted()
    room.agent.stop()
    room.agent.forget()
    room.agent.start()
    room.agent.until_said("cartridge-03.*: mounted: at ")
    room.agent.stop()
    run("sfdisk", "-q", "--no-tell-kernel", "--part-label", disk, "1", "cartridge-01")
    room.medium.pull()
    run("udevadm", "settle")


def lvm_label() -> bytes:
    """Return a physical volume's label, with its checksum (lib/format_text/layout.h of LVM)."""
    label = (struct.pack("<I8s", 32, b"LVM2 001") + b"a" * 32).ljust(492, b"\0")
    checksum = zlib.crc32(label, 0xF597A6CF ^ 0xFFFFFFFF) ^ 0xFFFFFFFF
    return bytes(512) + b"LABELONE" + struct.pack("<QI", 1, checksum) + label


def md_header() -> bytes:
    """Return an array member's header of version 1.2, with its checksum (md_p.h)."""
    header = bytearray(256)
    struct.pack_into("<II8x16s", header, 0, 0xA92B4EFC, 1, b"u" * 16)
    struct.pack_into("<Q", header, 144, 4096 // 512)
    total = sum(struct.unpack("<64I", header))
    struct.pack_into("<I", header, 216, (total & 0xFFFFFFFF) + (total >> 32))
    return bytes(4096) + bytes(header)


HEADERS: Final = {
    "crypto_LUKS": b"LUKS\xba\xbe\0\1".ljust(512, b"\0"),
    "LVM2_member": lvm_label(),
    "linux_raid_member": md_header(),
}


@pytest.mark.parametrize("header", HEADERS)
def test_a_medium_with_another_programs_header_is_left_alone_before_udevs_report_too(
    room: Room, header: str
) -> None:
    set_waiting(room, waits=False)
    with room.medium.disposable():
        Path(room.medium.partition).write_bytes(HEADERS[header])
        room.medium.pull()
        run("udevadm", "settle")
        room.agent.start()
        with udevd_hanging():
            room.medium.plug()
            until(lambda: room.medium.is_plugged and os.path.exists(room.medium.partition))
            has_heard_of_it(room)
            assert room.leftovers() == []
        room.agent.until_said(f"ignored: it has a header of {header}")
        assert room.agent.calls == []
        room.agent.stop()


def test_a_second_luks_header_that_an_earlier_use_has_left_is_no_obstacle(room: Room) -> None:
    room.agent.start()
    room.medium.plug()
    room.medium.settle()
    room.check_served()
    room.agent.stop()
    again = b"SKUL\xba\xbe\0\2".ljust(256, b"\0") + struct.pack(">Q", 0x4000)
    with open(room.medium.partition, "r+b") as partition:
        partition.seek(0x4000)
        partition.write(again)
    room.agent.forget()
    room.agent.start()
    room.agent.until_said("cartridge-01.*: (mounted|failed)")
    assert not any("a header of" in line for line in room.agent.log_lines)
    room.agent.stop()
    room.medium.restore()
    room.medium.pull()


def test_no_rule_that_debian_brings_keeps_a_medium_waiting_for_udev() -> None:
    rules = UdevRules()
    try:
        assert Path("/usr/lib/udev/rules.d/60-persistent-storage.rules").exists()
        assert not rules.may_opt_out()
    finally:
        rules.close()
