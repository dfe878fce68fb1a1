"""A mapping of an earlier run is adopted if it leads to its medium, and released whatever it is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug import names
from caam_hotplug.kernel import device_users, devmapper
from kernel.agents import Room, mappings, tables
from kernel.cartridges import Cartridge, cartridges
from kernel.holders import hold_open, process
from kernel.test_restarts import until_grown, write_without_an_error
from kernel.witness import Medium, loop_medium, run

SECTORS: Final = 8192
GROWN: Final = 10240
PATTERN: Final = b"not for another medium; " * 4096
WRITEBACK: Final = Path("/proc/sys/vm/dirty_writeback_centisecs")
NAME: Final = "caam-later"
LATER: Final = "CAAM-HOTPLUG-2-7-1"
"""A DM-UUID of a form that no version has had so far."""


@pytest.fixture(scope="module")
def roomy(media: list[Cartridge]) -> Iterator[Cartridge]:
    """A medium with free space after its partition, beside those of the room."""
    assert media
    with cartridges(["cartridge-03"], sectors=SECTORS) as (made,):
        yield made


def resize(medium: Cartridge, sectors: int) -> None:
    """Change the partition's size in the table and in the kernel, as a person does."""
    disk = f"/dev/{medium.disk.name}"
    run(
        "sfdisk", "-q", "-f", "-N1", "--no-reread", "--no-tell-kernel", disk, stdin=b",%d" % sectors
    )
    run("partx", "--update", "--nr", "1", disk)
    run("udevadm", "settle")
    size = medium.disk / f"{medium.disk.name}1/size"
    assert int(size.read_text()) == sectors


def killed(room: Room, medium: Cartridge | None = None) -> None:
    room.agent.start()
    room.plug_and_check(medium)
    room.agent.kill()


@contextmanager
def no_writeback() -> Iterator[None]:
    """Let the kernel write nothing by itself meanwhile."""
    before = WRITEBACK.read_text()
    WRITEBACK.write_text("0")
    try:
        yield
    finally:
        WRITEBACK.write_text(before)


def write_unsynced(room: Room) -> None:
    """Write over a file that is on the medium, so that only its content waits in memory."""
    file = room.point() / "file"
    file.write_bytes(bytes(len(PATTERN)))
    run("sync", "-f", str(file))
    with file.open("r+b") as opened:
        opened.write(PATTERN)


def load(table: str) -> None:
    """Give the agent's mapping another table, and flush nothing."""
    (name,) = mappings()
    run("dmsetup", "suspend", "--noflush", "--nolockfs", name)
    run("dmsetup", "load", name, "--table", table)
    run("dmsetup", "resume", "--noflush", "--nolockfs", name)


def test_a_medium_that_has_grown_under_a_writer_is_adopted_and_locked_by_a_stop(
    room: Room, roomy: Cartridge
) -> None:
    killed(room, roomy)
    with process(write_without_an_error, room.point(roomy)):
        resize(roomy, GROWN)
        room.agent.start()
        room.agent.until_said_ever("adopting its mount")
        room.check_served(roomy)
        until_grown(room.point(roomy) / "log")
    assert f"0 {SECTORS} crypt" in tables(roomy.label)[0]
    room.agent.stop()
    assert mappings() == []
    room.agent.start()
    room.check_served(roomy)
    assert f"0 {GROWN} crypt" in tables(roomy.label)[0]
    room.agent.stop()
    resize(roomy, SECTORS)
    roomy.pull()


def test_a_medium_in_use_stays_while_the_table_has_no_entry_for_it_and_is_adopted_after_that(
    room: Room, roomy: Cartridge
) -> None:
    killed(room, roomy)
    disk = f"/dev/{roomy.disk.name}"
    table = run("sfdisk", "--dump", disk).encode()
    only_table = ("sfdisk", "-q", "-f", "--no-reread", "--no-tell-kernel")
    with process(write_without_an_error, room.point(roomy)):
        run(*only_table, "--delete", disk, "1")
        run("udevadm", "settle")
        room.agent.start()
        room.agent.until_said_ever("its mapping is left alone.*partlabel, parttype, partuuid")
        until_grown(room.point(roomy) / "log")
        run(*only_table, disk, stdin=table)
        room.agent.until_said("adopting its mount")
        room.check_served(roomy)
        until_grown(room.point(roomy) / "log")
    room.agent.stop()
    assert mappings() == []
    roomy.pull()


@pytest.mark.parametrize(
    "rule", ["crypt.sector_size = 4096", "crypt.iv_offset = 8", 'crypt.flags = ["allow_discards"]']
)
def test_a_medium_in_use_is_adopted_as_it_was_made_though_the_rule_says_otherwise_now(
    room: Room, rule: str
) -> None:
    killed(room)
    before = tables()
    room.configure(rule)
    with process(write_without_an_error, room.point()):
        room.agent.start()
        room.agent.until_said_ever("adopting its mount")
        room.check_served()
        until_grown(room.point() / "log")
    assert tables() == before
    room.agent.stop()
    room.check_released()
    room.medium.pull()


def test_a_medium_that_has_shrunk_is_flushed_and_released_by_a_stop(
    room: Room, roomy: Cartridge
) -> None:
    killed(room, roomy)
    file = room.point(roomy) / "file"
    file.write_bytes(b"written before")
    resize(roomy, SECTORS - 64)
    room.agent.start()
    room.agent.until_said_ever("is not what rule 'cartridges' asks for")
    assert room.point(roomy).is_mount()
    room.agent.stop()
    assert mappings() == []
    resize(roomy, SECTORS)
    room.agent.start()
    room.check_served(roomy)
    assert file.read_bytes() == b"written before"
    room.agent.stop()
    roomy.pull()


@pytest.fixture
def other() -> Iterator[Medium]:
    """A device that nothing may be written to."""
    with loop_medium(16 << 20) as made:
        yield made


@pytest.mark.parametrize(
    "table",
    [
        "0 {sectors} linear {other} 0",
        "0 {sectors} crypt aes-cbc-plain 00000000000000000000000000000000 0 {other} 0",
        "0 64 linear {own} 0\n64 {rest} linear {other} 0",
    ],
    ids=["elsewhere", "elsewhere-encrypted", "in-part"],
)
def test_a_stop_releases_a_mapping_that_leads_elsewhere_and_writes_nothing_through_it(
    room: Room, other: Medium, table: str
) -> None:
    # Up to 5 s after a mount, ext4 begins to zero inode tables (ext4_lazyinit_thread).
    room.configure('mount.filesystem_options.ext4 = ["commit=3600", "noinit_itable"]')
    killed(room)
    (line,) = tables()
    sectors, own = int(line.split()[1]), room.medium.partition
    with no_writeback():
        write_unsynced(room)
        load(table.format(sectors=sectors, rest=sectors - 64, own=own, other=other.device))
        room.agent.start()
        room.agent.until_said_ever("is not what rule 'cartridges' asks for")
        assert room.point().is_mount()
        before = other.file.read_bytes()
        room.agent.stop()
        room.check_released()
        assert "leads elsewhere, so nothing more is written through it" in room.agent.everything()
        assert other.file.read_bytes() == before
    room.medium.pull()


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_medium_that_was_unmounted_by_hand_in_use_is_not_mounted_by_the_next_agent(
    room: Room, end: str
) -> None:
    room.agent.start()
    room.plug_and_check()
    with process(hold_open, room.point()):
        run("umount", "-l", str(room.point()))
        room.agent.until_said("failed: unmounted by somebody else; mapping .* is held open")
        getattr(room.agent, end)()
        room.agent.start()
        room.agent.until_said_ever("failed: unmounted by somebody else; mapping .* is held open")
        assert not room.point().is_mount()
    room.agent.until_said("locked: unmounted by somebody else")
    room.check_released()
    assert "mounted: at" not in room.agent.everything()
    room.medium.pull()


def test_a_mapping_that_is_suspended_and_not_mounted_is_read_by_no_agent_before_its_resume(
    room: Room,
) -> None:
    killed(room)
    run("umount", str(room.point()))
    (name,) = mappings()
    run("dmsetup", "suspend", "--noflush", "--nolockfs", name)
    room.agent.start()
    said = room.agent.until_said_ever(f"failed: mapping {name} is suspended, and writes wait")
    for command in said.split("`")[1].split(" && "):
        run(*command.split())
    room.check_served()
    assert mappings() == [name]
    room.pull_and_check()


def test_a_mapping_of_a_later_version_is_left_alone_and_said(room: Room) -> None:
    run("dmsetup", "create", NAME, "--uuid", LATER, "--table", "0 8 zero")
    try:
        room.agent.start()
        room.agent.until_said_ever(f"{NAME} .* is left alone: DM-UUID {LATER}")
        room.plug_and_check()
        room.agent.stop()
        (left,) = devmapper.ours()
        assert (left.uuid, left.table) == (LATER, ("0 8 zero",))
    finally:
        run("dmsetup", "remove", "--retry", NAME)
    room.medium.pull()


def test_a_mapping_of_a_later_version_on_a_disk_is_a_user_of_it_that_is_named(
    room: Room,
) -> None:
    room.medium.plug()
    room.medium.settle()
    which = f"{(room.medium.disk / 'diskseq').read_text().strip()}-1"
    for uuid, users in (
        (names.DM_UUID_PREFIX + which, []),
        (LATER, [f"mapping {NAME} lies on it"]),
    ):
        table = f"0 8 linear {room.medium.partition} 0"
        run("dmsetup", "create", NAME, "--uuid", uuid, "--table", table)
        try:
            assert device_users.of_disk(room.medium.disk.name) == users
        finally:
            run("dmsetup", "remove", "--retry", NAME)
    room.medium.pull()


def test_a_volume_that_the_first_version_has_locked_stays_locked(room: Room) -> None:
    room.medium.plug()
    room.medium.settle()
    node, disk = room.medium.partition, room.medium.disk
    which = f"{(disk / 'diskseq').read_text().strip()}-1"
    os.setxattr(node, "trusted.caam-hotplug", f"{which} ejected".encode())
    room.agent.start()
    room.agent.until_said_ever(f"{room.medium.label}.*: locked: before the agent was started")
    assert mappings() == []
    room.agent.stop()
    room.medium.pull()
