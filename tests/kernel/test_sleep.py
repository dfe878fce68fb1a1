"""The machine sleeps under live mappings, and the CAAM may have begun another session meanwhile.

The kernel's own test of a sleep (pm_test in Documentation/power/basic-pm-debugging.rst) freezes all
processes here, and suspends no device: 9p, by which the guest has this tree, answers nothing any
more after that. It leaves the clock alone. A clock that is set stands for the resume of a sleep
that stops it.
"""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.formats.crypt_table import Crypt, crypt_target
from caam_hotplug.kernel.medium_sample import Outcome, Sample
from caam_hotplug.model import SECTOR_BYTES, KeyReference, Mapping
from fakes.contract import created, dm_name, found, key_added, until
from kernel.agents import Room, mounts, tables
from kernel.cartridges import HELLO, KEY, TEXT, Cartridge
from kernel.real import RealWorld
from kernel.witness import Board, change_the_clock, create, run

BLOCK: Final = 4096
BLOCKS: Final = 600
POWER: Final = Path("/sys/power")


def sleep_and_wake() -> None:
    """Freeze all processes, and thaw them at once."""
    Path("/sys/module/suspend/parameters/pm_test_delay").write_text("0")
    (POWER / "pm_test").write_text("freezer")
    try:
        (POWER / "state").write_text("freeze")
    finally:
        (POWER / "pm_test").write_text("none")


both_signs = pytest.mark.parametrize("wake", [sleep_and_wake, change_the_clock])


@pytest.fixture
def board(media: list[Cartridge]) -> Iterator[Board]:
    """A board whose CAAM may begin another session: a filesystem may have written noise then."""
    yield Board()
    for medium in media:
        with medium.disposable():
            pass


@pytest.fixture
def room(board: Board, room: Room) -> Room:
    """A room whose agent has ended before the media get back what they held."""
    assert board
    return room


def check_compared(room: Room, volumes: int = 1) -> None:
    """Check that these volumes are compared, and that their keys are the same.

    The first sample is taken when a volume is mounted already, and then it is there.
    """
    change_the_clock()
    for _ in range(volumes):
        room.agent.until_said("compared after the sleep: the key is the one that it was")


@contextmanager
def blob_of_kind(room: Room, enc: str) -> Iterator[None]:
    """The medium's blob covers the key in this way."""
    (room.blobs / "cartridge-01.bb").write_bytes(create(enc, "-t", KEY).blob)
    yield


def plaintext(room: Room) -> bytes:
    """What is on the medium under the right key."""
    partition = room.medium.partition
    sectors = run("blockdev", "--getsz", partition).strip()
    table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {partition} 0"
    run("dmsetup", "create", "witness", "--table", table)
    try:
        return Path("/dev/mapper/witness").read_bytes()
    finally:
        run("dmsetup", "remove", "--retry", "witness")


@both_signs
def test_a_medium_whose_key_is_the_same_stays_mounted(room: Room, wake: Callable[[], None]) -> None:
    room.agent.start()
    room.plug_and_check()
    for _ in range(2):
        wake()
        room.agent.until_said("compared after the sleep: the key is the one that it was")
    (room.point() / "written").write_bytes(b"after the sleep")
    room.check_still_mounted()
    room.pull_and_check()


@pytest.mark.parametrize("enc", ["ecb", "ccm"])
def test_a_medium_whose_key_was_lost_is_removed_unsafely_and_no_noise_is_written(
    room: Room, board: Board, enc: str
) -> None:
    with blob_of_kind(room, enc):
        room.agent.start()
        room.plug_and_check()
        check_compared(room)
        with (room.point() / HELLO).open("rb"):
            board.new_session()
            change_the_clock()
            room.agent.until_said("removed-unsafely: its key was lost")
            (table,) = tables("cartridge-01")
            assert table.endswith(" error")
            assert not any(f" {room.point()} " in line for line in mounts())
        until(lambda: tables("cartridge-01") == [])
        assert TEXT in plaintext(room)
        room.agent.forget()
        room.medium.pull()
        room.plug_and_check()  # with a key of the new session
        room.pull_and_check()


def test_volumes_under_several_keys_are_compared_and_the_agent_goes_on(
    room: Room, board: Board
) -> None:
    room.agent.start()
    for medium in (room.medium, room.neighbour):
        room.plug_and_check(medium)
    check_compared(room, volumes=2)
    board.new_session()
    change_the_clock()
    for _ in range(2):
        room.agent.until_said("removed-unsafely: its key was lost")
    until(lambda: tables() == [])
    room.agent.until_pinged(2)


class Writer(threading.Thread):
    """Writes the blocks of a file one after the other, past the cache, until a write fails."""

    def __init__(self, file: Path, blocks: int) -> None:
        super().__init__(daemon=True)
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC)
        self._blocks = blocks
        self._page = mmap.mmap(-1, BLOCK)
        self.done: list[float] = []
        """When each write was done."""
        for number in range(blocks):
            self._write(number, b"a")
        os.fsync(self._file)

    def _write(self, number: int, letter: bytes) -> None:
        self._page[:] = letter * BLOCK
        os.pwritev(self._file, [self._page], number * BLOCK)

    def run(self) -> None:
        try:
            for number in range(self._blocks):
                self._write(number, b"x")
                self.done.append(time.monotonic())
        except OSError as error:
            assert error.errno in {errno.EIO, errno.EROFS}
        finally:
            os.close(self._file)


@pytest.mark.soak
def test_noise_is_written_only_between_the_wake_and_the_error_table(
    room: Room, board: Board
) -> None:
    room.agent.start()
    room.plug_and_check()
    check_compared(room)
    writer = Writer(room.point() / "blocks", BLOCKS)
    board.new_session()
    with room.agent.suspended():
        change_the_clock()
        writer.start()
        until(lambda: len(writer.done) > 2, every_s=0.001)
    woken = time.monotonic()
    until(lambda: all(line.endswith(" error") for line in tables("cartridge-01")), every_s=0.01)
    stopped = time.monotonic()
    writer.join()
    room.agent.until_said("removed-unsafely: its key was lost")
    until(lambda: tables("cartridge-01") == [])
    meanwhile = sum(at > woken for at in writer.done)
    print(
        f"error table after {(stopped - woken) * 1000:.0f} ms; {meanwhile} blocks of noise in them"
    )
    written = plaintext(room)
    room.medium.restore()  # what was written as noise is not only in that file
    sectors = [written[at : at + SECTOR_BYTES] for at in range(0, len(written), SECTOR_BYTES)]
    untouched = BLOCKS - len(writer.done) - 1
    assert untouched > 0
    assert sectors.count(b"a" * SECTOR_BYTES) >= untouched * BLOCK // SECTOR_BYTES
    assert b"x" * SECTOR_BYTES not in sectors


# what is compared


def map_with(world: RealWorld, crypt: Crypt) -> None:
    """Make the mapping of this rule live, under the blob's key."""
    with key_added(world) as length:
        line = crypt_target(world.volume, crypt, KeyReference("logon", length)).to_line()
        world.kernel.load_table(dm_name(world), line, read_only=False)
    world.kernel.activate_mapping(dm_name(world))


def sample(world: RealWorld, mapping: Mapping) -> Sample:
    """What is read at this moment."""
    return world.kernel.sample(world.volume, mapping)


@pytest.mark.parametrize("crypt", [Crypt(), Crypt(sector_size=4096, offset=8)], ids=["512", "4096"])
@pytest.mark.parametrize("program", ["mkfs.ext4 -q", "mkfs.vfat", "mkfs.exfat"])
def test_a_sample_proves_the_key_whatever_a_filesystem_has_written_since(
    world: RealWorld, board: Board, program: str, crypt: Crypt
) -> None:
    with created(world):
        map_with(world, crypt)
        mapping = found(world)
        run(*program.split(), mapping.node)
        run("mount", mapping.node, "/mnt")
        try:
            before = sample(world, mapping)
            for number in range(40):
                Path(f"/mnt/{number}").write_bytes(os.urandom(20000))
            run("sync", "-f", "/mnt")
            after = sample(world, mapping)
            assert before.compared(after) is Outcome.SAME
            board.new_session()
            lost = sample(world, mapping)
            assert before.compared(lost) is after.compared(lost) is Outcome.OTHER_KEY
        finally:
            world.kernel.load_error_table(mapping.uuid)
            run("umount", "-l", "/mnt")


def test_what_cannot_be_decrypted_has_no_plaintext_in_the_sample(world: RealWorld) -> None:
    with created(world):
        map_with(world, Crypt())
        mapping = found(world)
        world.kernel.load_error_table(mapping.uuid)
        assert set(sample(world, mapping).plain) == {None}


def test_a_writer_that_never_pauses_does_not_keep_the_machine_awake_nor_lose_the_medium(
    room: Room,
) -> None:
    room.agent.start()
    room.plug_and_check()
    code = f"import os\nf = os.open('{room.point()}/f', os.O_CREAT | os.O_WRONLY)\n"
    code += "while True: os.pwrite(f, b'x' * 4096, 0); os.fsync(f)"
    with subprocess.Popen([sys.executable, "-c", code]) as writer:
        try:
            until((room.point() / "f").exists)
            sleep_and_wake()
            room.agent.until_said("compared after the sleep: the key is the one that it was")
        finally:
            writer.kill()
    room.check_still_mounted()
    room.pull_and_check()
