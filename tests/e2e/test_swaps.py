"""Cards are changed quickly under a mounted filesystem: nothing of one is written to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.swaps import Socket, Swaps

UDEVD = "systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd.service"


@pytest.mark.parametrize(
    ("socket", "load"),
    [
        ("reader", "dirty"),
        ("reader", "dirty and open"),
        ("reader", "written without a pause"),
        ("slot", "written without a pause"),
    ],
)
async def test_a_card_is_as_it_was_after_it_has_taken_the_place_of_a_mounted_one(
    guest: Guest, agent: InstalledAgent, tmp_path: Path, socket: Socket, load: str
) -> None:
    swaps = Swaps(guest, tmp_path, seed=1)
    await swaps.prepare(agent)
    outcome = await swaps.change(socket, load)
    print(outcome)
    await swaps.end()
    assert outcome.is_right


async def test_without_udevd_the_next_card_of_a_reader_is_served_too(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await guest.run("systemctl", "stop", *UDEVD.split())
    swaps = Swaps(guest, tmp_path, seed=1)
    await swaps.prepare(agent)
    outcome = await swaps.change("reader", "dirty")
    await swaps.end()
    await guest.run("systemctl", "start", *UDEVD.split())
    assert outcome.is_right
