"""Requests for the agent as a whole."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable

import pytest
import pytest_asyncio

from caam_hotplug.config.loader import Config
from caam_hotplug.daemon import agent as module
from caam_hotplug.daemon.agent import Agent
from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.errors import HotplugError


class FakeSupervisor:
    def __init__(self) -> None:
        self.in_force: list[object] = []

    def reevaluate(self, rules: object) -> None:
        self.in_force.append(rules)


class FakeNotifier:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, *lines: str) -> None:
        self.sent.append(lines[0])


class Room:
    """An agent whose configuration can be on a filesystem that hangs."""

    def __init__(self) -> None:
        self.supervisor, self.notifier = FakeSupervisor(), FakeNotifier()
        self.answers = threading.Event()
        self.reads = 0
        self.agent = Agent(
            Config(),
            self._load,
            self.supervisor,
            self.notifier,
            StatusRegistry(),  # type: ignore[arg-type]
        )

    def _load(self) -> Config:
        self.reads += 1
        self.answers.wait()
        return Config()


@pytest_asyncio.fixture
async def room() -> AsyncIterator[Room]:
    made = Room()
    # The code as it should not be waits for the thread: the test is to fail then, not to hang.
    rescue = threading.Timer(60, made.answers.set)
    rescue.start()
    yield made
    rescue.cancel()
    made.answers.set()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0)


@pytest.mark.parametrize("by", ["signal", "request"])
def test_a_reload_that_hangs_does_not_delay_a_stop(room: Room, by: str) -> None:
    async def serve() -> None:
        if by == "signal":
            room.agent.reload_soon()
        else:
            asking = asyncio.create_task(room.agent.reload("a test"))
            await asyncio.sleep(0)
            asking.cancel()
        await until(lambda: room.reads)

    asyncio.run(serve())
    assert not room.answers.is_set()
    assert room.supervisor.in_force == []


async def test_a_reload_that_hangs_ends_with_the_reason_and_the_next_one_reads(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_READ_WITHIN_S", 0.01)
    with pytest.raises(HotplugError, match="read the configuration: no answer within"):
        await room.agent.reload("a test")
    assert "the rules before stay in force" in caplog.text
    assert room.notifier.sent == ["RELOADING=1", "READY=1"]
    assert room.supervisor.in_force == []
    monkeypatch.setattr(module, "_READ_WITHIN_S", 30)
    room.answers.set()
    await room.agent.reload("a test")
    assert room.supervisor.in_force == [Config().rule]
