"""Cards are changed quickly under a mounted filesystem: nothing of one is written to the next."""

from __future__ import annotations

from pathlib import Path

import pytest

from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.swaps import Socket, Swaps


@pytest.mark.parametrize(
    ("socket", "load"),
    [
        ("reader", "dirty and open"),
        ("reader", "written without a pause"),
        ("slot", "dirty"),
        pytest.param("slot", "written without a pause", marks=pytest.mark.soak),
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
