"""A bench for lives: the real supervisor over a fake kernel, one deterministic loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from caam_hotplug.board import Board
from caam_hotplug.lifecycle.claims import Claims
from caam_hotplug.lifecycle.host import Host
from caam_hotplug.lifecycle.lane import Lane
from caam_hotplug.lifecycle.life import Surroundings
from caam_hotplug.lifecycle.sweep import sweep
from caam_hotplug.model import Appeared, Disappeared, EventsLost, State, Volume
from caam_hotplug.rules import BUILT_IN, Rule
from caam_hotplug.supervisor import Supervisor
from fakes.kernel import FakeHost, FakeKernel, ProcessDiedError

T = TypeVar("T")


class InlineLane(Lane):
    """A lane whose calls happen in the loop, a turn later: the same order every time."""

    def _begin(self, function: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        loop.call_soon(work)
        return future


class Bench:
    """One machine: a kernel, and an agent that can be started, stopped, cancelled and killed."""

    def __init__(self, rules: tuple[Rule, ...] = BUILT_IN) -> None:
        self.kernel = FakeKernel()
        self.rules = rules
        self.board = Board()
        self.states: list[tuple[Volume, State, str]] = []
        self._runner = asyncio.Runner()
        self._main: asyncio.Task[None] | None = None
        self._host: FakeHost | None = None
        self._supervisor: Supervisor | None = None

    def close(self) -> None:
        """No loop is left."""
        self._runner.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, on this bench's loop."""
        return self._runner.run(coroutine)

    def turns(self, count: int) -> None:
        """The loop has gone round so many times."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(turn())

    def settle(self) -> None:
        """Nothing happens any more that is not waiting for the outside."""
        before = -1
        while before != len(self.kernel.steps) + len(self.states):
            before = len(self.kernel.steps) + len(self.states)
            self.turns(60)

    def start(self) -> None:
        """An agent has been started; it has not had a turn yet."""
        self._host = self.kernel.process()
        self.board = Board()
        self.board.listen(lambda e: self.states.append((e.volume, e.state, e.reason)))
        around = surroundings(self._host, self.rules, self.board)
        started = list(self.kernel.media.values())

        async def main() -> None:
            there = {medium.volume.id for medium in started}
            lane = around.new_lane("sweep")
            inherited = await sweep(around.host, lane, around.dm_lane, there)
            async with Supervisor(around, inherited) as supervisor:
                supervisor.start([Appeared(medium.volume) for medium in started])
                self._supervisor = supervisor
                await asyncio.Event().wait()

        async def create() -> asyncio.Task[None]:
            return asyncio.create_task(main())

        self._supervisor = None
        self._main = self.run(create())

    def stop(self) -> None:
        """The agent was told to stop, and has ended."""
        if self._supervisor is None:
            self.settle()
        assert self._supervisor is not None
        self._supervisor.stop()
        self.settle()
        self.cancel()

    def cancel(self) -> None:
        """The agent's task was cancelled, and everything of it has ended."""
        assert self._main is not None
        main, self._main = self._main, None

        async def ended() -> None:
            main.cancel()
            await asyncio.wait({main})

        self.run(ended())

    def kill(self) -> None:
        """The agent's process is dead; the kernel keeps what it had made."""
        assert self._host is not None
        self._host.die()
        main, self._main = self._main, None
        assert main is not None

        async def ended() -> None:
            main.cancel()
            await asyncio.wait({main})
            if not main.cancelled():
                main.exception()

        self.run(ended())

    @property
    def running(self) -> bool:
        """Whether an agent runs."""
        return self._main is not None

    def appear(self, volume: Volume) -> None:
        """The agent hears of the volume, if it listens already."""
        self._take(Appeared(volume))

    def insert(self, label: str = "cartridge-01", name: str = "sda1", **facts: Any) -> Volume:
        """A medium was inserted, and the agent hears of it."""
        volume = self.kernel.insert(label, name, **facts)
        self.appear(volume)
        return volume

    def yank(self, name: str = "sda1") -> None:
        """The medium was pulled, and the agent hears of it."""
        self.kernel.yank(name)
        self._take(Disappeared(name))

    def lose_events(self, *, listed: bool = True) -> None:
        """The agent hears that it has not heard everything; perhaps udev lists nothing now."""
        self._take(EventsLost(), listed=listed)

    def _take(self, event: Appeared | Disappeared | EventsLost, *, listed: bool = True) -> None:
        if self._main is None:
            return
        if self._supervisor is None:
            self.settle()  # events wait in the socket until the agent has enumerated
        assert self._supervisor is not None
        supervisor = self._supervisor
        media = self.kernel.media.values() if listed else ()
        present = [Appeared(medium.volume) for medium in media]

        async def take() -> None:
            supervisor.take(event, present)

        self.run(take())

    def state(self, volume: Volume) -> State:
        """What the board says of the volume; GONE if nothing."""
        entries = {entry.volume.id: entry.state for entry in self.board.entries()}
        return entries.get(volume.id, State.GONE)

    def said(self, volume: Volume) -> str:
        """The reason that stands beside the volume's state."""
        return next(e.reason for e in self.board.entries() if e.volume.id == volume.id)


def surroundings(host: Host, rules: tuple[Rule, ...], board: Board) -> Surroundings:
    """What lives share, with lanes that are deterministic."""

    def new_lane(name: str) -> Lane:
        return InlineLane(name, 10.0)

    lane = new_lane("mappings")
    return Surroundings(host, rules, new_lane, lane, Claims(), board.publish, 10.0)


__all__ = ["Bench", "InlineLane", "ProcessDiedError", "surroundings"]
