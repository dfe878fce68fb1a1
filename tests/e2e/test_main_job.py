"""The main job on a real kernel: plug a medium, read it, pull it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.support import ANY_BUS, ON_EACH_KERNEL, ON_EVERY_BOARD, POINT, blobs_up_to, labelled
from vm import media
from vm.boards import BOARDS, TAGGED, Board
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import KEYS, OTPMK_A, OTPMK_B


async def check_served(guest: Guest, board: Board) -> None:
    """Check that the medium's file is readable, its mapping is the target, and its key is gone."""
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    table = (await guest.run("dmsetup", "table")).stdout
    assert f" crypt {board.target}caam-hotplug:" in table
    await guest.until("! grep -q caam-hotplug /proc/keys")
    options = (await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")).stdout.split()[5]
    assert {"nosuid", "nodev", "noexec"} <= set(options.split(","))


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("bus", "board"),
    [
        *(pytest.param("usb", board, id=f"usb-{board.backend}") for board in BOARDS),
        *(pytest.param(bus, TAGGED, id=f"{bus}-tagged") for bus in ("sd", "scsi")),
    ],
    indirect=["board"],
    scope="package",
)
async def test_a_medium_is_mounted_when_plugged_and_leaves_nothing_when_pulled(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path, bus: str
) -> None:
    if bus == "scsi":  # not removable, so the built-in rule does not match
        await agent.configure(ANY_BUS)
    await agent.start()
    pid = await agent.main_pid()
    count_fds = f"ls /proc/{pid}/fd | wc -l"
    before = (await guest.sh(count_fds)).stdout
    match bus:
        case "usb":
            plug = await guest.plug_usb(medium)
        case "sd":
            plug = await guest.insert_sd(medium)  # type: ignore[assignment]
        case _:
            plug = await guest.plug_scsi(medium)
    await guest.until_mounted(POINT)
    await check_served(guest, board)
    await plug.pull()
    await agent.until_said(r"cartridge-01.*removed-unsafely")
    assert await agent.leftovers() == []
    # The first count may have had one that was only passing.
    assert int((await guest.sh(count_fds)).stdout) <= int(before)
    assert await agent.main_pid() == pid


async def test_all_libraries_are_loaded_before_the_first_medium_arrives(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    maps = f"/proc/{await agent.main_pid()}/maps"
    await guest.until(f"grep -q libblkid {maps}")
    opened = f"grep -o '/.*[.]so.*' {maps} | sort -u"
    before = (await guest.sh(opened)).stdout
    assert "libssl" not in before
    plug = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    assert (await guest.sh(opened)).stdout == before
    await plug.pull()
    await agent.until_said(r"cartridge-01.*removed-unsafely")


@ON_EACH_KERNEL
async def test_a_loop_device_with_partitions_is_served_and_released_at_the_stop(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    # No event reports the detach of a loop device in use; it leaves with its last user.
    await agent.configure(ANY_BUS)
    await agent.stop()
    carrier = await guest.plug_scsi(labelled(tmp_path, "cartridge-01", board, size_mib=4))
    await guest.until("test -b /dev/sda1")
    await guest.run("cp", "/dev/sda", "/var/tmp/medium.img")
    await carrier.pull()
    await agent.start()
    await guest.run("losetup", "-fP", "/var/tmp/medium.img")
    await guest.until_mounted(POINT)
    await check_served(guest, board)
    await agent.stop()
    assert await agent.leftovers() == []
    await guest.run("losetup", "-D")


@ON_EACH_KERNEL
async def test_media_present_before_the_start_and_arriving_during_it_are_mounted_once(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.stop()
    await blobs_up_to(guest, 4)
    images = [labelled(tmp_path, f"cartridge-{n:02}", board) for n in range(1, 5)]
    await guest.plug_usb(images[0])
    await guest.plug_usb(images[1])
    await guest.until("test -b /dev/sda1 -a -b /dev/sdb1")
    await guest.run("systemctl", "start", "--no-block", "caam-hotplug")
    await guest.plug_usb(images[2])
    await guest.plug_usb(images[3])
    await agent.until_said("mounted: at", times=4)
    await guest.run("udevadm", "settle")
    mounts = (await guest.run("cat", "/proc/self/mountinfo")).stdout
    journal = await agent.journal()
    for n in range(1, 5):
        assert mounts.count(f" /run/media/cartridge-{n:02} ") == 1
        assert journal.count(f"mounted: at /run/media/cartridge-{n:02},") == 1


FILL_AND_LEAVE = """
mkfs.ext4 -q -L card /dev/mapper/card
mkdir -p /mnt/card
mount /dev/mapper/card /mnt/card
echo "made by hand" > /mnt/card/made
umount /mnt/card
dmsetup remove card
keyctl clear @s
"""


@ON_EVERY_BOARD
async def test_a_medium_made_by_the_boards_procedure_opens_after_a_cold_boot_and_on_no_other_board(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.stop()
    blank = tmp_path / "blank.img"
    media.write_disk(blank, "cartridge-07", bytes(16 << 20))
    stick = await guest.plug_usb(blank)
    await guest.until("test -b /dev/sda1")
    await guest.sh(board.procedure + FILL_AND_LEAVE)
    await guest.cold_boot_caam(OTPMK_A)
    await agent.start()
    await guest.until_mounted("/run/media/cartridge-07")
    assert await guest.read("/run/media/cartridge-07/made") == b"made by hand\n"
    await agent.stop()
    await stick.pull()

    made = media.partition_bytes(blank)
    await guest.cold_boot_caam(OTPMK_B)
    await agent.start()
    await stick.plug()
    log = await agent.until_said(r"cartridge-07.*failed")
    assert board.refusal in log
    await stick.pull()
    await guest.until("! test -e /sys/class/block/sda")
    assert media.partition_bytes(blank) == made
    await guest.cold_boot_caam(OTPMK_A)


@pytest.mark.parametrize("name", ["ecb-32", "ccm-16", "ccm-32"])
async def test_keys_of_all_sizes_and_coverings_open_their_media(
    guest: Guest, agent: InstalledAgent, tmp_path: Path, name: str
) -> None:
    await agent.start()
    await guest.plug_usb(media.make_medium(tmp_path / "m.img", name, key=KEYS[name]))
    await guest.until_mounted(f"/run/media/{name}")
    assert await guest.read(f"/run/media/{name}/hello.txt") == b"Encrypted data\n"


async def test_a_key_that_the_cipher_cannot_use_has_another_error_than_a_wrong_key(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    await guest.plug_usb(media.make_medium(tmp_path / "m.img", "ecb-64"))
    log = await agent.until_said("ecb-64.*failed")
    assert "load table of mapping caam-ecb-64-" in log
    assert "Invalid argument" in log


@ON_EACH_KERNEL
async def test_a_vfat_medium_and_a_write_protected_one_are_mounted_too(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await blobs_up_to(guest, 2)
    protected = labelled(tmp_path, "cartridge-02", board)
    before = media.partition_bytes(protected)
    await agent.start()
    await guest.plug_usb(labelled(tmp_path, "cartridge-01", board, filesystem="vfat"))
    locked = await guest.plug_usb(protected, read_only=True)
    await agent.until_said("mounted: at", times=2)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    lines = await agent.until_said("cartridge-02, read-only")
    assert "mounted" in lines
    refused = await guest.sh("echo x > /run/media/cartridge-02/x", check=False)
    assert "Read-only file system" in refused.stderr
    await locked.pull()
    await agent.until_said("cartridge-02.*gone")
    assert media.partition_bytes(protected) == before


UDEVD = ["systemd-udevd", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"]


@ON_EACH_KERNEL
async def test_without_udevd_media_are_served_by_the_kernels_own_events(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
) -> None:
    await agent.stop()
    await guest.run("systemctl", "stop", *UDEVD)
    await agent.configure('source = "kernel"\n')
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await check_served(guest, board)
    await stick.pull()
    await guest.until_unmounted(POINT)
    await agent.until_said("cartridge-01.*removed-unsafely")
    assert await agent.leftovers() == []
    await guest.run("systemctl", "start", *UDEVD)


async def test_a_run_by_hand_writes_a_timeline(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.stop()
    command = ["caam-hotplug", "run", "--trace", "/run/caam-hotplug.trace"]
    await guest.run("systemd-run", "--unit=traced", "--collect", *command)
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await stick.pull()
    await guest.until_unmounted(POINT)
    await guest.run("systemctl", "kill", "--signal=INT", "traced")
    await guest.until("! systemctl is-active --quiet traced")
    events = [event for event in json.loads(await guest.read(command[-1])) if event]
    await guest.run("rm", command[-1])
    spans = {event["name"]: event for event in events if event["ph"] == "X"}
    taken = ["look who uses it", "load the table", "probe", "mount"]
    assert taken == sorted(taken, key=lambda step: spans[step]["ts"])
    waited_for = {event["name"] for event in events if event["ph"] == "b"}
    assert {"identify and more", "unmount", "remove the mapping"} <= waited_for
    assert spans["start Python"]["ts"] < spans["import caam_hotplug.daemon.main"]["ts"]
    late = [event for event in events if event["name"].startswith("import ")]
    first = next(event for event in events if event["name"] == "look who uses it")
    assert [event["name"] for event in late if event["ts"] > first["ts"]] == ["import the blob"]
    assert await agent.leftovers() == []
