"""The installed agent in a restored guest, with the proof that it leaves nothing behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from vm import installed, media
from vm.fixtures import guest_for, pytest_runtest_makereport
from vm.guest import Guest
from vm.installed import InstalledAgent


@pytest.fixture
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[Guest]:
    """A guest restored for this test alone, with the agent running in it."""
    async with guest_for(request, installed.layer()) as restored:
        yield restored


@pytest.fixture
async def agent(guest: Guest) -> AsyncIterator[InstalledAgent]:
    """The agent, running with its built-in rule; stopped afterwards, when nothing may be left."""
    agent = InstalledAgent(guest, running=True)
    yield agent
    await agent.stop()
    assert await agent.leftovers() == []


@pytest.fixture
def medium(tmp_path: Path) -> Path:
    """An encrypted medium labelled cartridge-01, large enough to pass for an SD card."""
    return media.make_medium(tmp_path / "cartridge-01.img", total_mib=64)


__all__ = ["agent", "guest", "medium", "pytest_runtest_makereport"]
