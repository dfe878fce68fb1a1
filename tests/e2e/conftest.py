"""The installed agent in a restored guest, with the proof that it leaves nothing behind.

A guest serves test after test: restored, it has nothing of its code translated yet, and everything
in it is slow once more. It is given up, and another one restored, when a test has failed in it.
A test that changes more of it than media, configuration, blobs and mount points puts that back as
its last step.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from vm import boards, installed, machine, media
from vm.boards import Board
from vm.fixtures import passed, pytest_runtest_makereport
from vm.guest import Guest
from vm.installed import InstalledAgent

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests here share an event loop, as they share a guest."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.asyncio(loop_scope="session"), append=False)


class Shared:
    """The guest that serves the tests, if there is one."""

    def __init__(self) -> None:
        self._held = contextlib.AsyncExitStack()
        self._guest: Guest | None = None
        self._kernel: installed.Kernel = "nxp"

    async def guest(self, kernel: installed.Kernel) -> Guest:
        """The one there is, if it has this kernel, or one restored now."""
        if self._guest is not None and self._kernel != kernel:
            await self.give_up()
        if self._guest is None:
            layer = installed.layer(kernel)
            self._guest = await self._held.enter_async_context(machine.restored(layer))
            self._kernel = kernel
        return self._guest

    async def give_up(self) -> None:
        """No guest is there."""
        self._guest = None
        await self._held.aclose()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def shared() -> AsyncIterator[Shared]:
    made = Shared()
    yield made
    await made.give_up()


@pytest_asyncio.fixture(loop_scope="session")
async def guest(
    request: pytest.FixtureRequest, shared: Shared, board: Board
) -> AsyncIterator[Guest]:
    """A guest as it was saved, with the kernel and the blobs of the board, and the agent in it."""
    guest = await shared.guest("nxp" if board.backend == "tagged" else "mainline")
    for name, blob in board.blobs().items():
        await guest.write(f"/data/caam/{name}", blob)
    yield guest
    if not await passed(request, guest):
        await shared.give_up()
        return
    try:
        await installed.put_back(guest)
    except BaseException:
        await shared.give_up()
        raise


@pytest_asyncio.fixture(loop_scope="session")
async def agent(guest: Guest) -> AsyncIterator[InstalledAgent]:
    """The agent, to be started; stopped afterwards, when nothing may be left."""
    shown = await guest.sh("journalctl --sync; journalctl -n 0 --show-cursor")
    _, found, cursor = shown.stdout.partition("cursor: ")
    assert found, shown.stdout
    agent = InstalledAgent(guest, since=cursor.strip())
    yield agent
    await agent.stop()
    assert await agent.leftovers() == []


@pytest.fixture(scope="package")
def board(request: pytest.FixtureRequest) -> Board:
    """The board that a test is for: NXP's unless the test's module names others."""
    board: Board = getattr(request, "param", boards.TAGGED)
    return board


@pytest.fixture
def medium(tmp_path: Path, board: Board) -> Path:
    """An encrypted medium labelled cartridge-01, large enough to pass for an SD card."""
    return media.make_medium(tmp_path / "cartridge-01.img", total_mib=64, **board.medium)


__all__ = ["agent", "board", "guest", "medium", "pytest_runtest_makereport"]
