"""Media move to other keys beside the agent, which releases them before and mounts them after."""

from __future__ import annotations

import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from documented import commands
from vm import installed, machine
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A

LABEL = "archive-01"
POINT = f"/run/media/{LABEL}"


def documented(words: str) -> str:
    """The command of docs/migrate.md with these words. Raises: ValueError if not one has them."""
    is_dry = "--dry-run" in words
    (command,) = [
        each
        for each in commands("docs/migrate.md")
        if f" {words}" in each and ("--dry-run" in each) is is_dry
    ]
    return command


@pytest_asyncio.fixture(loop_scope="session")
async def archive(guest: Guest, agent: InstalledAgent, tmp_path: Path) -> AsyncIterator[None]:
    """On a board with NXP's keys and mainline's: a medium with a file, mounted by the agent."""
    await agent.stop()
    await guest.sh(f"board-kernel both {OTPMK_A}", timeout_s=120)
    # The guest's own files would not outlive a power cut, so that no journal may be among them.
    await guest.sh(
        "truncate -s 32M /var/tmp/store; mkfs.ext4 -q /var/tmp/store; "
        "mount -o loop /var/tmp/store /data/caam; chmod 700 /data/caam"
    )
    await agent.start()
    with (tmp_path / "archive.img").open("wb") as file:
        file.truncate(16 << 20)
    await guest.plug_usb(tmp_path / "archive.img")
    await guest.until("test -b /dev/sda")
    await guest.run("caam-hotplug", "provision", "/dev/sda", "--label", LABEL)
    await guest.until_mounted(POINT)
    await guest.sh(f"seq 500000 > {POINT}/kept; sync -f {POINT}/kept")
    yield
    await agent.stop()
    await guest.sh("umount /data/caam; rm /var/tmp/store")
    await guest.sh(f"board-kernel nxp {OTPMK_A}", timeout_s=120)


async def is_whole(guest: Guest) -> None:
    """The medium is mounted, with what was on it."""
    await guest.until_mounted(POINT)
    await guest.sh(f"seq 500000 | cmp - {POINT}/kept")


@pytest.mark.usefixtures("archive")
async def test_a_medium_is_released_moved_and_mounted_again_by_its_new_key(
    guest: Guest, agent: InstalledAgent
) -> None:
    busy = await guest.sh(documented("--to trusted"), check=False)
    assert busy.returncode == 1
    assert f"caam-{LABEL}-" in busy.stderr
    assert "release it with `caam-hotplug lock /dev/sda1`" in busy.stderr
    await guest.sh(documented("lock archive-01"))
    planned = await guest.sh(documented("--to trusted --dry-run"), timeout_s=300)
    assert planned.stdout.endswith("nothing was changed\n")
    done = await guest.sh(documented("--to trusted"), timeout_s=300)
    assert done.stdout.startswith(f"/dev/sda1: {LABEL} is under a trusted key")
    assert "stays so until `caam-hotplug unlock archive-01`" in done.stderr
    await guest.sh(documented("unlock archive-01"))
    await is_whole(guest)
    assert "by its trusted key" in await agent.journal()
    await guest.run("caam-hotplug", "key", "create", "board", "--backend", "trusted")
    for to, how in (("encrypted", "encrypted key"), ("tagged", "tagged key")):
        await guest.sh(documented("lock archive-01"))
        await guest.sh(documented(f"--to {to}"), timeout_s=300)
        await guest.sh(documented("unlock archive-01"))
        await is_whole(guest)
        assert f"by its {how}" in await agent.journal()
    await guest.run("rm", "/root/archive-01.recovery")
    kept = await guest.sh("cd /data/caam; ls -A | grep archive | sort")
    assert kept.stdout.split() == [
        f"{LABEL}.bb", f"{LABEL}.bb.encrypted", f"{LABEL}.bb.tagged", f"{LABEL}.bb.trusted",
    ]  # fmt: skip


@pytest.mark.usefixtures("archive")
@pytest.mark.soak
async def test_a_medium_that_is_half_moved_is_left_alone_until_the_same_command_has_ended_it(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await guest.sh(documented("lock archive-01"))
    command = documented("--to trusted")
    await guest.sh(
        f"{command} 2>/tmp/said & until grep -q moving /tmp/said; do :; done; kill -KILL %1; wait"
    )
    await guest.pull_all()
    await guest.until("! test -e /sys/class/block/sda1")
    await guest.plug_usb(tmp_path / "archive.img")
    marked = "lsblk -nrpo NAME,PARTLABEL | sed -n 's/ .caam-hotplug.*migrating.*//p'"
    await guest.until(f'test -n "$({marked})"')
    told = await guest.sh(f"udevadm settle; caam-hotplug explain $({marked})")
    assert "it is not finished; run the same `provision` or `migrate` again" in told.stdout
    await agent.stop()
    await agent.start()
    shown = await guest.run("caam-hotplug", "status", "--all")
    assert POINT not in shown.stdout
    done = await guest.sh(command, timeout_s=300)
    assert f"{LABEL} is under a trusted key" in done.stdout
    await is_whole(guest)
    await guest.run("rm", "/tmp/said")


async def test_after_a_power_cut_amid_a_piece_the_same_command_moves_the_rest(
    tmp_path: Path,
) -> None:
    """The power is cut when QEMU is killed: what the guest has not synced is lost."""
    store, stick = tmp_path / "store.img", tmp_path / "archive.img"
    for file, mib in ((store, 32), (stick, 16)):
        with file.open("wb") as opened:
            opened.truncate(mib << 20)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", store], check=True)
    command = f"caam-hotplug migrate {LABEL} --to trusted"
    async with machine.restored(installed.layer()) as guest:
        await board_with(guest, store, stick)
        await guest.run("caam-hotplug", "provision", "/dev/sdb", "--label", LABEL)
        agent = InstalledAgent(guest)
        await agent.start()
        await guest.until_mounted(POINT)
        await guest.sh(f"seq 500000 > {POINT}/kept")
        await agent.stop()
        calls = "pwritev,pwritev2"
        cut = f"strace -f -qq -o /dev/null -e trace={calls} -e inject={calls}:signal=KILL:when=10"
        assert (await guest.sh(f"{cut} {command}", check=False)).returncode in {137, -9}
    async with machine.restored(installed.layer()) as guest:
        await board_with(guest, store, stick)
        done = await guest.sh(command, timeout_s=300)
        assert f"{LABEL} is under a trusted key" in done.stdout
        agent = InstalledAgent(guest)
        await agent.start()
        await is_whole(guest)
        await agent.stop()


async def board_with(guest: Guest, store: Path, stick: Path) -> None:
    """It has both kinds of keys; its blobs are on /dev/sda, the medium is /dev/sdb."""
    await guest.sh(f"board-kernel both {OTPMK_A}", timeout_s=120)
    await guest.plug_scsi(store)
    await guest.until("test -b /dev/sda")
    await guest.sh("mount /dev/sda /data/caam; chmod 700 /data/caam")
    await guest.plug_usb(stick)
    await guest.until("test -b /dev/sdb")
