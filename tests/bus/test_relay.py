"""What others send neither keeps the loop from other work, nor fills the memory."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import pytest_asyncio

from bus import flood
from bus.agents import FakeAgent, FakeRegistry
from bus.private import PrivateBus
from bus.test_wire import with_field
from caam_hotplug.dbus import relay
from caam_hotplug.dbus.relay import AGENTS, CLIENTS, Limits, Relay
from caam_hotplug.dbus.service import Service
from caam_hotplug.volume.worker import Threads, Worker

PING = flood.call(*flood.CALLS["ping"])
GET = flood.CALLS["get"]
UNANSWERED = flood.call(*GET, flags=1)
UNLIMITED = replace(AGENTS, share=1, burst_s=1e6)


class Ends:
    """A relay between the end of a bus and the end of sdbus, both in the test's hands."""

    def __init__(self, limits: Limits = UNLIMITED, *, is_at_work: bool = False) -> None:
        self.is_at_work = is_at_work
        self.bus, self._sdbus = socket.socketpair()
        self.handled: list[bytes] = []
        self.reply = b""
        """What sdbus sends for everything that it gets."""
        self.ended = asyncio.Event()
        self.relay = Relay(
            self._sdbus.fileno(), self._process, self.ended.set, limits, lambda: self.is_at_work
        )
        self._sdbus.setblocking(False)
        self.bus.setblocking(False)

    def _process(self) -> None:
        self.handled.append(self._sdbus.recv(1 << 20))
        self._sdbus.sendall(self.reply)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0)

    def close(self) -> None:
        self.relay.close()
        self._sdbus.close()
        self.bus.close()


@pytest_asyncio.fixture
async def ends(nothing_left: None) -> AsyncIterator[Ends]:
    made = Ends()
    yield made
    made.close()


class Noting(FakeRegistry):
    """A registry that notes when it is read, and in which turn of the loop."""

    def __init__(self) -> None:
        self.turn = 0
        self.read_in: list[int] = []
        self.read_at: list[float] = []
        super().__init__()

    @property
    def counters(self) -> Counter[str]:
        self.read_in.append(self.turn)
        self.read_at.append(asyncio.get_running_loop().time())
        return Counter()

    @counters.setter
    def counters(self, _: Counter[str]) -> None:
        pass

    async def count(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


async def test_one_request_is_handled_in_a_turn_of_the_loop(
    bus: PrivateBus, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "AGENTS", UNLIMITED)
    registry = Noting()
    async with Service(registry) as service:
        service.accept(agent := FakeAgent(registry), agent)
        await service.first_attempt(30)
        asker = flood.connected(f"{bus.folder}/socket")
        burst = flood.bursts(["get"], 0)
        asker.sendall(next(burst))
        turns = asyncio.create_task(registry.count())
        async with asyncio.timeout(60):
            while len(registry.read_in) < flood.SENT_AT_ONCE:
                await asyncio.sleep(0)
        turns.cancel()
        await asyncio.gather(turns, return_exceptions=True)
        asker.close()
    assert max(Counter(registry.read_in).values()) == 1


async def test_requests_pause_while_calls_to_the_kernel_are_made(
    bus: PrivateBus, nothing_left: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "AGENTS", UNLIMITED)
    registry, threads = Noting(), Threads()
    worker = Worker("volume 9-1", 60, threads)
    async with Service(registry, threads.are_at_work) as service:
        service.accept(agent := FakeAgent(registry), agent)
        await service.first_attempt(30)
        asker = flood.connected(f"{bus.folder}/socket")
        asker.sendall(next(flood.bursts(["get"], 0)))
        async with asyncio.timeout(60):
            while len(registry.read_at) < 3:
                await worker.run("a call", int, late=lambda _why: None)
            while len(registry.read_at) < flood.SENT_AT_ONCE:
                await asyncio.sleep(0)
        asker.close()
    assert registry.read_at[2] - registry.read_at[1] >= relay._PAUSE_S


async def test_what_takes_long_is_put_off_and_the_rest_is_not_read(nothing_left: None) -> None:
    ends = Ends(replace(AGENTS, share=1e-6, burst_s=0))
    try:
        ends.bus.sendall(PING * 100)
        await ends.until(lambda: ends.relay._next is not None)
        later = ends.relay._next
        assert isinstance(later, asyncio.TimerHandle)
        assert later.when() > asyncio.get_running_loop().time() + 1
        assert ends.handled == [PING]
    finally:
        ends.close()


@pytest.mark.parametrize("message", [PING, UNANSWERED], ids=["of use", "dropped"])
async def test_while_a_medium_is_served_messages_wait_for_each_other(
    nothing_left: None, message: bytes
) -> None:
    ends = Ends(is_at_work=True)
    try:
        await until_a_pause(ends, message)
        assert len(ends.handled) <= 1
        ends.is_at_work = False
        ends.bus.sendall(PING)
        await ends.until(lambda: ends.handled[-1:] == [PING] and not ends.relay._came)
    finally:
        ends.close()


async def test_replies_and_the_authentication_do_not_wait_while_a_medium_is_served(
    nothing_left: None,
) -> None:
    ends = Ends(is_at_work=True)
    reply = bytearray(PING)
    reply[1] = 2
    try:
        ends.bus.sendall(b"OK 0123\r\n" + bytes(reply) * 2 + PING)
        while len(ends.handled) < 4:
            assert not isinstance(ends.relay._next, asyncio.TimerHandle)
            await asyncio.sleep(0)
    finally:
        ends.close()


async def until_a_pause(ends: Ends, message: bytes) -> None:
    """Send so many of the message that the relay does not look at all of them, and waits."""
    ends.bus.sendall(message * 100)
    await ends.until(lambda: ends.relay._next is not None)
    pause = ends.relay._next
    assert isinstance(pause, asyncio.TimerHandle)
    assert ends.relay._came
    for _ in range(100):
        await asyncio.sleep(0)
    assert ends.relay._next is pause


async def test_requests_wait_while_the_bus_takes_no_replies(ends: Ends) -> None:
    ends.reply = bytes(64 << 10)
    ends.bus.sendall(PING * 100)
    await ends.until(lambda: bool(ends.relay._unsent))
    before = len(ends.handled)
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(ends.handled) == before < 100
    got = 0

    def drained() -> bool:
        nonlocal got
        with suppress(BlockingIOError):
            got += len(ends.bus.recv(1 << 20))
        return got == 100 * len(ends.reply)

    await ends.until(drained)
    assert ends.handled == [PING] * 100


async def test_what_is_sent_by_itself_reaches_the_bus(ends: Ends) -> None:
    ends._sdbus.sendall(b"a signal")
    await ends.until(lambda: select_readable(ends.bus))
    assert ends.bus.recv(100) == b"a signal"


def select_readable(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1, socket.MSG_PEEK))
    except BlockingIOError:
        return False


async def test_what_was_sent_before_the_close_reaches_the_bus(nothing_left: None) -> None:
    ends = Ends()
    ends._sdbus.sendall(b"a signal")
    ends.relay.close()
    assert ends.bus.recv(100) == b"a signal"
    ends._sdbus.close()
    ends.bus.close()


async def test_a_message_that_comes_in_parts_is_handled_whole(ends: Ends) -> None:
    for at in range(len(PING)):
        ends.bus.sendall(PING[at : at + 1])
        await asyncio.sleep(0)
    ends.bus.sendall(b"OK 0123\r\nAGREE_UNIX_FD\r\n")
    await ends.until(lambda: len(ends.handled) == 3)
    assert ends.handled == [PING, b"OK 0123\r\n", b"AGREE_UNIX_FD\r\n"]


@pytest.mark.parametrize("times", [1, 40])
async def test_a_message_that_is_too_large_is_dropped_as_it_comes(
    ends: Ends, times: int, caplog: pytest.LogCaptureFixture
) -> None:
    large = flood.call("org.freedesktop.DBus.Properties", "Get", ("x" * (1 << 20), "y"))
    stream = memoryview(large * times + PING)

    def sent() -> bool:
        nonlocal stream
        assert len(ends.relay._came) <= AGENTS.message_bytes
        with suppress(BlockingIOError):
            stream = stream[ends.bus.send(stream) :]
        return bool(ends.handled)

    await ends.until(sent)
    assert ends.handled == [PING]
    assert len(caplog.records) == 1
    assert "is dropped" in caplog.text


async def test_a_client_takes_large_messages(nothing_left: None) -> None:
    ends = Ends(CLIENTS)
    large = flood.call("a.b", "C", ("x" * (1 << 20),))
    stream = memoryview(large)

    def sent() -> bool:
        nonlocal stream
        with suppress(BlockingIOError):
            stream = stream[ends.bus.send(stream) :]
        return sum(map(len, ends.handled)) == len(large)

    await ends.until(sent)
    assert b"".join(ends.handled) == large
    ends.close()


async def test_descriptors_are_closed_and_their_message_dropped(ends: Ends) -> None:
    read, write = os.pipe()
    with_one = with_field(PING, b"\x09\1u\0\1\0\0\0")
    socket.send_fds(ends.bus, [with_one], [write])
    os.close(write)
    ends.bus.sendall(PING)
    await ends.until(lambda: bool(ends.handled))
    assert ends.handled == [PING]
    assert os.read(read, 1) == b""  # nobody has the other end
    os.close(read)


@pytest.mark.parametrize("last", [b"", b"x" * (32 << 10)], ids=["closed", "malformed"])
async def test_the_end_of_the_bus_is_noticed_on_both_sides(ends: Ends, last: bytes) -> None:
    if last:
        ends.bus.sendall(last)
    else:
        ends.bus.close()
    async with asyncio.timeout(30):
        await ends.ended.wait()
    assert ends._sdbus.recv(1) == b""
