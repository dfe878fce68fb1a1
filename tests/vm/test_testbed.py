"""Tests of the test bed itself, which other tests rely on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from vm import cache, machine
from vm.guest import SLOW, CommandFailedError, Guest, GuestDiedError
from vm.media import KEY, OTPMK_A, OTPMK_B, encrypt, make_medium, write_disk

PLAIN_OPEN = "echo 0 $(blockdev --getsz {device}) crypt aes-cbc-plain {key} 0 {device} 0"
OPEN_AND_READ = f"""
    dmsetup create plain --table "$({PLAIN_OPEN})"
    mount -o ro /dev/mapper/plain /mnt
    cat /mnt/hello.txt
    umount /mnt
    dmsetup remove --retry plain
"""


async def test_a_command_gives_its_status_and_both_outputs(guest: Guest) -> None:
    done = await guest.run("bash", "-c", "cat; echo bad >&2; exit 7", stdin=b"in", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "in", "bad\n")
    with pytest.raises(CommandFailedError, match="bad"):
        await guest.sh("echo bad >&2; false")
    with pytest.raises(CommandFailedError, match="timed out"):
        await guest.run("sleep", "60", timeout_s=0.5)


async def test_commands_run_side_by_side(guest: Guest) -> None:
    waiting = asyncio.create_task(guest.until("test -e /tmp/sign"))
    await guest.write("/tmp/sign", b"\0\xff", mode=0o600)
    await waiting
    assert await guest.read("/tmp/sign") == b"\0\xff"
    assert (await guest.run("stat", "-c", "%a", "/tmp/sign")).stdout == "600\n"


async def test_a_large_file_is_copied_in_and_out_unchanged(guest: Guest) -> None:
    data = random.Random(1).randbytes(4 << 20)
    await guest.write("/var/tmp/large", data)
    assert await guest.read("/var/tmp/large") == data


async def test_a_restored_guest_has_no_changes_of_an_earlier_one() -> None:
    numbers = set()
    for _ in range(2):
        async with machine.restored() as guest:
            await guest.sh("test ! -e /root/trace; touch /root/trace")
            numbers.add(await guest.read("/proc/sys/kernel/random/uuid"))
    assert len(numbers) == 2


async def test_the_repository_is_mounted_read_only(guest: Guest) -> None:
    assert await guest.read("/src/tests/vm/test_testbed.py") == Path(__file__).read_bytes()
    await guest.sh("! touch /src/trace")


@pytest.mark.parametrize("filesystem", ["ext4", "vfat"])
async def test_a_usb_stick_is_plugged_read_by_software_encryption_and_pulled(
    guest: Guest, tmp_path: Path, filesystem: str
) -> None:
    medium = make_medium(
        tmp_path / "m.img",
        filesystem="ext4" if filesystem == "ext4" else "vfat",
    )
    stick = await guest.plug_usb(medium, serial="S1")
    label = "/dev/disk/by-partlabel/cartridge-01"
    for _ in range(2):
        await guest.until(f"test -e {label}")
        done = await guest.sh(OPEN_AND_READ.format(device=label, key=KEY.hex()))
        assert done.stdout == "Encrypted data\n"
        properties = (await guest.sh(f"udevadm info -q property {label}")).stdout.splitlines()
        assert {"ID_BUS=usb", "ID_SERIAL_SHORT=S1", "PARTNAME=cartridge-01"} <= set(properties)
        await stick.pull()
        await guest.until(f"! test -e {label}")
        await stick.plug()


async def test_an_sd_card_is_inserted_and_pulled(guest: Guest, tmp_path: Path) -> None:
    card = await guest.insert_sd(make_medium(tmp_path / "sd.img", total_mib=64))
    for _ in range(2):
        await guest.until("test -b /dev/mmcblk0p1")
        await card.pull()
        await guest.until("! test -e /dev/mmcblk0p1")
        await card.plug()


async def test_a_card_is_changed_in_a_reader_that_stays(guest: Guest, tmp_path: Path) -> None:
    reader = await guest.plug_reader(make_medium(tmp_path / "a.img", "card-a"))
    another = await guest.open_card(make_medium(tmp_path / "b.img", "card-b"))
    await guest.until("test -e /dev/disk/by-partlabel/card-a")
    await reader.remove()
    await reader.insert(another)
    await guest.until("test -e /dev/disk/by-partlabel/card-b")
    await guest.sh("! test -e /dev/disk/by-partlabel/card-a; test -b /dev/sda1")
    await reader.remove()
    await guest.until("! test -e /dev/sda1; test -b /dev/sda")
    await reader.pull()
    await guest.until("! test -e /dev/sda")


async def test_a_scsi_disk_is_plugged_and_pulled(guest: Guest, tmp_path: Path) -> None:
    disk = await guest.plug_scsi(make_medium(tmp_path / "m.img"), serial="D1", read_only=True)
    await guest.until("test -b /dev/sda1")
    assert await guest.read("/sys/block/sda/ro") == b"1\n"
    await disk.pull()
    await guest.until("! test -e /dev/sda1")


async def test_the_saved_blobs_are_those_of_board_a(guest: Guest) -> None:
    names = (await guest.sh("cd /data/caam; stat -c %a .; ls")).stdout.split()
    assert names[0] == "700"
    assert {"cartridge-01.bb", "ecb-32.bb", "ccm-16.bb"} <= set(names[1:])
    assert all(name.endswith(".bb") for name in names[1:])
    unlock = "caam-keygen import /data/caam/cartridge-01.bb key; od -An -tx1 -v /data/caam/key"
    before = (await guest.sh(unlock)).stdout
    await guest.cold_boot_caam(OTPMK_A)
    assert (await guest.sh(unlock)).stdout != before
    await guest.cold_boot_caam(OTPMK_B)
    assert "Bad message" in (await guest.sh(unlock)).stderr  # the tool always exits with 0


async def test_a_slow_stick_holds_its_input_and_output(guest: Guest, tmp_path: Path) -> None:
    medium = tmp_path / "m.img"
    stick = await guest.plug_usb(make_medium(medium), slow=True)
    await guest.until("test -b /dev/sda1")
    await guest.run("udevadm", "settle")
    await guest.throttle(stick, SLOW)
    read = "dd if=/dev/sda1 of=/dev/null bs=64k count=64 iflag=direct"
    reading = asyncio.create_task(guest.sh(read, check=False))
    await guest.until("ps -o stat= -C dd | grep -q D")
    await stick.pull()
    assert (await reading).returncode != 0


async def test_hostile_labels_reach_the_guest_as_they_are(guest: Guest, tmp_path: Path) -> None:
    labels = ["../../etc", "%s%n", "ä" * 36, "$(reboot)"]
    for number, label in enumerate(labels):
        write_disk(tmp_path / f"{number}.img", label, bytes(1 << 20))
        await guest.plug_usb(tmp_path / f"{number}.img")
    await guest.until(f"[ $(ls /sys/class/block | grep -c 'sd.1') = {len(labels)} ]")
    # Not PARTNAME in the kernel's uevent, which has seven bits of every character.
    name = "blkid -p -o value -s PART_ENTRY_NAME $device; echo"
    seen = (await guest.sh(f"for device in /dev/sd?1; do {name}; done")).stdout
    assert sorted(filter(None, seen.splitlines())) == sorted(labels)


async def test_a_guest_that_ended_is_noticed_at_once(guest: Guest) -> None:
    with pytest.raises(GuestDiedError, match="sysrq"):
        await guest.sh("sleep 0.2; echo c > /proc/sysrq-trigger; sleep 60")
    with pytest.raises(GuestDiedError):
        await guest.run("true")


def test_encryption_depends_on_the_sector() -> None:
    one, other = encrypt(bytes(1024), KEY)[:512], encrypt(bytes(1024), KEY)[512:]
    assert one != other


def test_a_medium_holds_no_plain_text(tmp_path: Path) -> None:
    medium = make_medium(tmp_path / "m.img")
    assert b"Encrypted data" not in medium.read_bytes()
    assert b"Encrypted data" in make_medium(tmp_path / "c.img", key=None).read_bytes()


def test_a_truncated_folder_is_built_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def build(folder: Path) -> None:
        made.append(folder)
        (folder / "state").write_bytes(b"whole")

    with cache.locked():
        for _ in range(2):
            folder = cache.built("thing", "0" * 16, build, says="Making")
        assert len(made) == 1
        (folder / "state").write_bytes(b"who")
        cache.built("thing", "0" * 16, build, says="Making")
    assert len(made) == 2
    assert "damaged" in capsys.readouterr().err
    assert (folder / "state").read_bytes() == b"whole"
