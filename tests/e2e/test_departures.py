"""Media are pulled at the worst time and put back at once: they are mounted again."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.support import ON_A_LIVE_MAPPING, POINT, labelled
from vm import media
from vm.boards import Board
from vm.guest import Guest
from vm.installed import InstalledAgent

ONE_MAPPING = "test $(dmsetup info -c --noheadings -o uuid | grep -c CAAM-HOTPLUG) = 1"


@ON_A_LIVE_MAPPING
async def test_a_medium_pulled_while_it_is_written_and_put_back_is_mounted_again(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(
        f"(while echo x; do :; done > {POINT}/growing) >/dev/null 2>&1 & echo $! > /tmp/writer"
    )
    await guest.until(f"test -s {POINT}/growing")
    await stick.pull()
    await agent.until_said("removed-unsafely")
    await stick.plug()
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await guest.sh("kill $(cat /tmp/writer) || true")
    await guest.until(ONE_MAPPING)


@ON_A_LIVE_MAPPING
async def test_the_second_medium_with_a_label_is_mounted_when_the_first_is_pulled(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await agent.start()
    first = await guest.plug_usb(labelled(tmp_path, "cartridge-01", board, files={"n": b"first"}))
    await guest.until_mounted(POINT)
    await guest.plug_usb(labelled(tmp_path, "cartridge-01", board, files={"n": b"second"}))
    log = await agent.until_said("conflict")
    assert "/run/media/cartridge-01 belongs to volume" in log
    assert await guest.read(f"{POINT}/n") == b"first"
    await first.pull()
    await agent.until_said("mounted: at", times=2)
    assert await guest.read(f"{POINT}/n") == b"second"


@ON_A_LIVE_MAPPING
async def test_an_orderly_stop_leaves_the_medium_clean(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.write(f"{POINT}/written", b"by a program\n")
    await agent.stop()
    assert await agent.leftovers() == []
    await stick.pull()
    plain = media.decrypt(media.partition_bytes(medium), **board.medium)
    assert b"by a program\n" in plain


@ON_A_LIVE_MAPPING
async def test_synthesized_events_change_nothing(
    guest: Guest, agent: InstalledAgent, board: Board, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    mounted = await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")
    await guest.sh(
        "for action in add change remove; do for dev in sda sda1; do\n"
        "echo $action > /sys/class/block/$dev/uevent; done; done\n"
        "udevadm trigger --action=add /dev/sda1; udevadm trigger --subsystem-match=block\n"
        "udevadm trigger --action=remove /dev/sda1; udevadm settle"
    )
    # Another medium's arrival comes after all those events in the agent's queue.
    await guest.sh("cp /data/caam/cartridge-01.bb /data/caam/cartridge-02.bb")
    await guest.plug_usb(labelled(medium.parent, "cartridge-02", board))
    await guest.until_mounted("/run/media/cartridge-02")
    assert (await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")).stdout == mounted.stdout
    journal = await agent.journal()
    assert journal.count("mounted: at /run/media/cartridge-01") == 1
    assert "detaching" not in journal


async def test_what_the_service_cannot_see_takes_no_medium_from_its_users(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    limit = f"prlimit --pid {await agent.main_pid()} --nofile"
    ask = "caam-hotplug status; caam-hotplug status"  # the agent has taken the event by then
    await guest.sh(
        "exec 7>/sys/class/block/sda1/uevent; mount -t tmpfs none /sys; echo change >&7\n"
        f"{ask}; umount /sys; {limit}=0:; echo change >&7; {ask}"
    )
    await agent.until_said("look at sda1: Too many open files .raise LimitNOFILE=")
    await guest.sh(f"{limit}=1024:")
    await agent.until_said("look at sda1: the kernel answers again")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    journal = await agent.journal()
    assert journal.count("mounted: at /run/media/cartridge-01") == 1
    assert "detaching" not in journal


@pytest.mark.timeout(1800)
async def test_thirty_two_media_at_once_are_all_mounted_and_all_gone(
    guest: Guest, agent: InstalledAgent, board: Board, tmp_path: Path
) -> None:
    await guest.sh("cd /data/caam; for n in $(seq 100 131); do cp cartridge-01.bb c-$n.bb; done")
    await agent.configure('[[rule]]\nname = "all"\nmatch.partlabel = "c-*"\n')
    await agent.start()
    images = [labelled(tmp_path, f"c-{n}", board, size_mib=4) for n in range(100, 132)]
    usb = [await guest.plug_usb(image) for image in images[:16]]
    scsi = [await guest.plug_scsi(image) for image in images[16:]]
    await guest.until("test $(grep -c ' /run/media/c-' /proc/self/mountinfo) = 32", deadline_s=900)
    for plug in [*usb, *scsi]:
        await plug.pull()
    await agent.until_said("c-1.*removed-unsafely", times=32, deadline_s=900)
    assert await agent.leftovers() == []
