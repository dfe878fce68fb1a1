"""A private bus, and the service on it with a fake agent."""

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
    """Make a directory that every user may enter, unlike those of pytest."""
    folder = Path(tempfile.mkdtemp(prefix="caam-bus-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def private_bus(monkeypatch: pytest.MonkeyPatch) -> Iterator[PrivateBus]:
    """A bus at the address of the system bus, not started yet."""
    with folder_for_all() as folder:
        bus = PrivateBus(folder)
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", bus.address)
        yield bus
        bus.stop()


@pytest.fixture
def bus(private_bus: PrivateBus) -> PrivateBus:
    """A running bus with the agent's policy."""
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
    """Tasks and descriptors at the begin of a test."""

    tasks: int
    descriptors: int


@pytest_asyncio.fixture
async def nothing_left() -> AsyncIterator[None]:
    """Check that the test leaves no task and no descriptor open."""
    asyncio.get_running_loop()
    before = Loop(len(asyncio.all_tasks()), descriptors())
    yield
    await asyncio.sleep(0)
    assert Loop(len(asyncio.all_tasks()), descriptors()) == before


def descriptors() -> int:
    """Return the number of open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


@pytest_asyncio.fixture
async def service(
    bus: PrivateBus, registry: FakeRegistry, agent: FakeAgent, nothing_left: None
) -> AsyncIterator[Service]:
    """The service, on the bus."""
    async with Service(registry, retry_after_s=0.05) as service:
        service.accept(agent, agent)
        await service.first_attempt(30)
        yield service


@pytest_asyncio.fixture
async def client(service: Service) -> AsyncIterator[Connection]:
    """A client in the process of the tests, for tests of the order of messages."""
    connection = Connection()
    await connection.ping()
    yield connection
    connection.close()
