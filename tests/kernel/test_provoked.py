"""Faults of a real kernel: each is reported, leaves nothing and disturbs no other medium."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from fakes.contract import until
from kernel.agents import Room, mappings
from kernel.cartridges import Faulty
from kernel.forked import Stop
from kernel.witness import Board, run

SYSCTL: Final = Path("/proc/sys/kernel")
SESSION_KEYRING: Final = -3
UNSEALED: Final = 1
"""Calls of an arrival until the key is out of its blob and not yet in a keyring."""


@contextmanager
def sysctl(name: str, value: str) -> Iterator[None]:
    file = SYSCTL / name
    before = file.read_text()
    file.write_text(value)
    try:
        yield
    finally:
        file.write_text(before)


def fails(room: Room, words: str) -> None:
    """Check that the medium fails with these words, and that nothing is left of the attempt."""
    room.agent.until_said(f"{room.medium.label}.*: failed: {words}")
    room.check_released()


def test_a_kernel_without_the_caam_driver_is_reported(room: Room) -> None:
    board = Board()
    room.agent.start()
    board.power_off()
    try:
        room.medium.plug()
        fails(room, "open /dev/caam-keygen: No such file or directory .is the kernel's")
    finally:
        board.restore()
    room.medium.pull()
    room.plug_and_check()


def test_a_kernel_without_the_cipher_is_reported(room: Room) -> None:
    room.configure('crypt.cipher = "capi:tk(ctr(aes))-plain"')
    room.agent.start()
    room.medium.plug()
    fails(room, "load table of mapping .*: No such file or directory .the kernel lacks dm-crypt or")


def test_a_kernel_without_dm_crypt_is_reported(room: Room) -> None:
    with unloaded("dm_crypt"), sysctl("modprobe", "/bin/false"):
        room.agent.start()
        room.medium.plug()
        fails(room, "load table of mapping .*: Invalid argument")
    room.medium.pull()
    room.plug_and_check()


def test_a_kernel_without_the_filesystem_is_reported(room: Room) -> None:
    with unloaded("ext4"), sysctl("modprobe", "/bin/false"):
        room.agent.start()
        room.medium.plug()
        fails(room, "mount .* .ext4.: No such device .the kernel lacks this filesystem")


@contextmanager
def unloaded(module: str) -> Iterator[None]:
    run("rmmod", module)  # modprobe would remove what it needs as well, which others may use
    try:
        yield
    finally:
        run("modprobe", module)


def test_an_exhausted_key_quota_is_reported(room: Room) -> None:
    room.agent.start()
    with sysctl("keys/root_maxkeys", "1"):
        room.medium.plug()
        fails(room, "add key caam-hotplug:.*: Disk quota exceeded .the user's key quota is used up")
    room.medium.pull()
    room.plug_and_check()


def test_a_revoked_session_keyring_is_reported(room: Room) -> None:
    room.agent.start(Stop(UNSEALED, revoke_session_keyring))
    room.medium.plug()
    fails(room, "add key caam-hotplug:.*: Key has been revoked")


def revoke_session_keyring() -> None:
    assert ctypes.CDLL("libkeyutils.so.1").keyctl_revoke(SESSION_KEYRING) == 0


@pytest.mark.parametrize(
    ("options", "cause"),
    [("nr_inodes=1", "No space left on device"), ("ro", "Read-only file system")],
)
def test_a_mount_root_without_room_for_a_directory_is_reported(
    room: Room, options: str, cause: str
) -> None:
    run("mount", "-t", "tmpfs", "-o", options, "tmpfs", str(room.mount_root))
    try:
        room.agent.start()
        room.medium.plug()
        room.agent.until_said(f"{room.medium.label}.*: failed: .*{cause}")
        assert mappings() == []
        room.agent.stop()
    finally:
        run("umount", str(room.mount_root))


@pytest.mark.parametrize("unreadable", [0, 2048 + 64], ids=["all", "all-but-the-superblock"])
def test_a_medium_that_cannot_be_read_fails_with_an_io_error(
    room: Room, faulty: Faulty, unreadable: int
) -> None:
    room.agent.start(Stop(UNSEALED))
    with faulty.plugged():
        room.agent.until_called(UNSEALED)
        faulty.fails_from(unreadable)
        room.agent.go_on()
        room.agent.until_said("failed: .*Input/output error")  # nor can udev read the label
        assert mappings() == []
        room.plug_and_check()


def test_a_slow_medium_is_stuck_for_a_while_and_then_mounted(room: Room, faulty: Faulty) -> None:
    room.agent.start(Stop(UNSEALED))
    with faulty.plugged():
        room.agent.until_called(UNSEALED)
        faulty.becomes("delay {below} 0 400")
        room.agent.go_on()
        room.agent.until_said("cartridge-03.*: stuck: ")
        faulty.becomes("linear {below} 0")
        room.agent.until_said("cartridge-03.*: mounted: at ")
        room.agent.stop()
    assert mappings() == []


def test_a_medium_that_takes_no_more_writes_is_released_and_the_loss_is_reported(
    room: Room, faulty: Faulty
) -> None:
    room.agent.start()
    with faulty.plugged():
        room.agent.until_said("cartridge-03.*: mounted: at ")
        point = room.mount_root / faulty.label
        faulty.becomes("flakey {below} 0 0 1000 1 error_writes")
        (point / "lost").write_bytes(b"x" * 100_000)
        room.agent.request_stop()
        room.agent.until_said(
            "cartridge-03.*: failed: could not release it: not all that was written to it has "
            f"reached the medium: flush {point}: Input/output error"
        )
        room.agent.until_ended()
        assert not point.exists()
        until(lambda: mappings() == [])
