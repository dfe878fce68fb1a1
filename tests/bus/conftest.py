"""A private bus, and the service on it with a fake agent behind."""

from __future__ import annotations

import asyncio
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from hypothesis import settings

from bus.agents import FakeAgent, FakeRegistry
from bus.private import PrivateBus
from caam_hotplug.dbus.connection import Connection
from caam_hotplug.dbus.service import Service

settings.register_profile("bus", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("bus")


@contextmanager
def folder_for_all() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's own."""
    folder = Path(tempfile.mkdtemp(prefix="caam-bus-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def private_bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateBus]:
    """A bus that has not been started, where the system's bus is looked for."""
    with folder_for_all() as folder:
        bus = PrivateBus(folder)
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        yield bus
        bus.stop()


@pytest.fixture
def bus(private_bus: PrivateBus) -> PrivateBus:
    """A bus that runs, with our policy."""
    private_bus.start()
    return private_bus


@pytest.fixture
def registry() -> FakeRegistry:
    return FakeRegistry()


@pytest.fixture
def agent(registry: FakeRegistry) -> FakeAgent:
    return FakeAgent(registry)


@dataclass(frozen=True, slots=True)
class Loop:
    """What the event loop had when a test began."""

    tasks: int
    descriptors: int


@pytest_asyncio.fixture
async def nothing_left() -> AsyncIterator[None]:
    """The test leaves no task and no descriptor behind."""
    asyncio.get_running_loop()
    before = Loop(len(asyncio.all_tasks()), descriptors())
    yield
    await asyncio.sleep(0)
    assert Loop(len(asyncio.all_tasks()), descriptors()) == before


def descriptors() -> int:
    """How many descriptors this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest_asyncio.fixture
async def service(
    bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent, nothing_left: None
) -> AsyncIterator[Service]:
    """The service, on the bus."""
    async with Service(registry, look_again_s=0.05) as service:
        service.accept(agent, agent)
        await service.tried(30)
        yield service


@pytest_asyncio.fixture
async def client(service: Service) -> AsyncIterator[Connection]:
    """A client in the tests' own process, for what the order of messages decides."""
    connection = Connection()
    await connection.greet()
    yield connection
    connection.close()
