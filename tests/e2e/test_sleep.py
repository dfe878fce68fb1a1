"""The guest sleeps with a medium in use, and finds it, or another in its place, when it wakes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import pytest
import pytest_asyncio

from e2e.conftest import Shared
from e2e.support import POINT
from vm.guest import Guest
from vm.installed import InstalledAgent

DEADLINE_S: Final = 120
MIB: Final = 1 << 20
QUIET: Final = """
[[rule]]
name = "without writes of ext4 itself"
match.partlabel = "cartridge-*"
mount.filesystem_options.ext4 = ["noinit_itable", "no_prefetch_block_bitmaps"]
"""
LAST_WORDS: Final = "Waiting for 2 second"
"""Of the kernel, before its test of a sleep waits with all devices suspended."""


@pytest_asyncio.fixture(scope="module", loop_scope="session", autouse=True)
async def other_tests_have_another_guest(shared: Shared) -> AsyncIterator[None]:
    """Once its devices were suspended, 9p does not answer: the guest has this tree no more."""
    yield
    await shared.give_up()


@asynccontextmanager
async def asleep(guest: Guest) -> AsyncIterator[None]:
    """The guest's processes are frozen and its devices suspended meanwhile, its clock goes on."""
    said = guest.console().count(LAST_WORDS)
    await guest.sh(
        "rm -f /tmp/woke; dmesg -n 7; echo N > /sys/module/printk/parameters/console_suspend\n"
        "echo 2 > /sys/module/suspend/parameters/pm_test_delay\n"
        "echo devices > /sys/power/pm_test\n"
        "(sleep 0.2; echo freeze > /sys/power/state; echo none > /sys/power/pm_test\n"
        "touch /tmp/woke) >/dev/null 2>&1 &"
    )
    deadline = time.monotonic() + DEADLINE_S
    while guest.console().count(LAST_WORDS) == said:
        assert time.monotonic() < deadline, guest.console()[-2000:]
        await asyncio.sleep(0.01)
    yield
    await guest.until("test -e /tmp/woke")


async def begin_to_write(guest: Guest) -> None:
    """A program writes to the medium all the time, and much of it is not on the medium yet."""
    code = (
        f"import os\nfile = os.open('{POINT}/growing', os.O_CREAT | os.O_WRONLY)\nat = 0\n"
        "while True:\n    os.pwrite(file, os.urandom(65536), at % 40 * 65536)\n    at += 1\n"
    )
    await guest.write("/tmp/writer.py", code.encode())
    await guest.sh("python3 /tmp/writer.py >/dev/null 2>&1 & echo $! > /tmp/writer")
    await guest.until(f"test -s {POINT}/growing")


def blank(folder: Path) -> Path:
    """A medium of zeros, on which nothing may be written."""
    image = folder / "blank.img"
    image.touch()
    with image.open("r+b") as file:
        file.truncate(64 * MIB)
    return image


def foreign_sectors(image: Path) -> int:
    """Count the sectors of a blank medium that somebody has written."""
    content, empty = image.read_bytes(), bytes(512)
    return sum(content[at : at + 512] != empty for at in range(0, len(content), 512))


async def test_a_medium_in_use_during_a_sleep_stays_mounted(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await begin_to_write(guest)
    async with asleep(guest):
        pass
    await agent.until_said("compared after the sleep: the key is the one that it was")
    await guest.sh("kill $(cat /tmp/writer)")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await stick.pull()
    await agent.until_said("removed-unsafely")


@pytest.mark.parametrize("place", ["port", "reader"])
async def test_what_was_meant_for_a_medium_is_not_written_to_one_that_took_its_place_in_a_sleep(
    guest: Guest, agent: InstalledAgent, medium: Path, tmp_path: Path, place: str
) -> None:
    await agent.start()
    other = blank(tmp_path)
    if place == "port":
        stick = await guest.plug_usb(medium, serial="SAME")
    else:
        reader = await guest.plug_reader(medium)
    await guest.until_mounted(POINT)
    await begin_to_write(guest)
    async with asleep(guest):
        if place == "port":
            stick = await guest.replace(stick, other)
        else:
            await reader.remove()
            await reader.insert(await guest.open_card(other))
    await agent.until_said("removed-unsafely")
    # In a reader, none but what is sent between the kernel's event and the agent's error table.
    until_noticed = foreign_sectors(other)
    assert until_noticed == 0 or place == "reader"
    print(f"{until_noticed} sectors of the other medium were written before that")
    await guest.sh("kill $(cat /tmp/writer) || true")
    await guest.until("! dmsetup table | grep -q caam-cartridge-01")
    await guest.sh("sync")
    assert foreign_sectors(other) == until_noticed


async def test_a_card_that_the_kernel_takes_for_the_one_before_is_noticed_by_its_table(
    guest: Guest, agent: InstalledAgent, medium: Path, tmp_path: Path
) -> None:
    """The kernel knows a card in a slot by its CID, and all of QEMU's have the same.

    So it goes on with the other card until the agent has compared the two.
    """
    await agent.start()
    other = blank(tmp_path)
    card = await guest.insert_sd(medium)
    await guest.until_mounted(POINT)
    await begin_to_write(guest)
    async with asleep(guest):
        await card.pull()
        await guest.insert_sd(other)
    await agent.until_said("removed-unsafely: another medium took its place")
    until_noticed = foreign_sectors(other)
    print(f"{until_noticed} sectors of the other card were written before that")
    await guest.sh("kill $(cat /tmp/writer) || true")
    await guest.until("! dmsetup table | grep -q caam-cartridge-01")
    await guest.sh("sync")
    assert foreign_sectors(other) == until_noticed


SYSTEMD: Final = "/run/systemd/system/systemd-{}.service.d/test.conf"
NO_SLEEP: Final = b"[Service]\nExecStart=\nExecStart=sh -c 'dmsetup table >/run/asleep'\n"
"""In place of the sleep itself: lists the mappings that would survive it."""
PUT_BACK: Final = (
    "rm -fr /run/systemd/system/systemd-*.service.d /etc/systemd/system/systemd-suspend.service.*\n"
    "rm -f /run/asleep; systemctl daemon-reload; systemctl reset-failed"
)


async def test_a_volume_in_use_refuses_hibernation_with_the_reason(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.write(SYSTEMD.format("hibernate"), NO_SLEEP)
    await guest.sh(
        "systemctl daemon-reload\n"
        f"sleep 1000 <{POINT}/hello.txt >/dev/null 2>&1 & echo $! >/tmp/user"
    )
    refused = await guest.run("systemctl", "start", "systemd-hibernate.service", check=False)
    assert refused.returncode != 0
    said = (await guest.sh("journalctl -u caam-hotplug-sleep -o cat --no-pager")).stdout
    assert "no sleep now: mapping caam-cartridge-01-" in said
    assert "(sleep) has " in said
    assert (await guest.run("test", "-e", "/run/asleep", check=False)).returncode != 0
    await guest.until_mounted(POINT)
    await guest.sh("kill $(cat /tmp/user)")
    await stick.pull()
    await agent.until_said("removed-unsafely")
    await guest.sh(PUT_BACK)


@pytest.mark.parametrize("kind", ["hibernate", "suspend"])
async def test_volumes_are_locked_before_a_sleep_that_requires_it(
    guest: Guest, agent: InstalledAgent, medium: Path, kind: str
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.write(SYSTEMD.format(kind), NO_SLEEP)
    if kind == "suspend":
        await guest.sh("systemctl add-requires systemd-suspend.service caam-hotplug-sleep.service")
    await guest.sh(f"systemctl daemon-reload; systemctl start systemd-{kind}.service")
    assert "cartridge-01" not in (await guest.read("/run/asleep")).decode()
    await agent.until_said("mounted: at", times=2)
    await stick.pull()
    await agent.until_said("removed-unsafely")
    await guest.sh(PUT_BACK)


async def test_a_volume_whose_key_was_lost_in_a_sleep_is_unlocked_on_request(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    # A thread of ext4 that reads noise writes at once that the filesystem is damaged.
    await agent.configure(QUIET)
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh("echo resume > /sys/module/caam_sim/parameters/new_session")
    async with asleep(guest):
        pass
    await agent.until_said("removed-unsafely: its key was lost")
    assert "removed-unsafely" in (await guest.run("caam-hotplug", "status")).stdout
    await guest.run("caam-hotplug", "unlock", "cartridge-01")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await stick.pull()
    await agent.until_said("mounted read-write", times=2)
