"""A bench for lives: the real supervisor over a fake kernel, one deterministic loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from caam_hotplug.config.rules import BUILT_IN, Rule
from caam_hotplug.daemon.status_registry import StatusRegistry
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.model import (
    Announced,
    Appeared,
    Disappeared,
    Entry,
    Event,
    EventsLost,
    State,
    Volume,
)
from caam_hotplug.volume.leftovers import find_leftovers
from caam_hotplug.volume.mount_points import MountPoints
from caam_hotplug.volume.record import Context
from caam_hotplug.volume.worker import Worker
from fakes.clock import Clock
from fakes.kernel import KEY, FakeKernel, FakeProcess, HangsError, ProcessDiedError

T = TypeVar("T")
LATE_AFTER_S = 3.0
"""A call that takes longer is late; time passes on the bench only as a test lets it."""


class InlineWorker(Worker):
    """A lane whose calls happen in the loop, a turn later: the same order every time."""

    def __init__(self, name: str, late_after_s: float, kernel: FakeKernel) -> None:
        super().__init__(name, late_after_s)
        self._kernel = kernel

    def _start(self, words: str, function: Callable[[], T]) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            answer: Callable[[], None]
            try:
                answer = partial(future.set_result, function())
            except HangsError as hang:
                loop.call_later(hang.seconds, work)
                return
            except BaseException as error:
                answer = partial(future.set_exception, error)
            late_s, self._kernel.answers_in_s = self._kernel.answers_in_s, 0.0
            if late_s:
                loop.call_later(late_s, answer)
            else:
                answer()

        loop.call_soon(work)
        return future


class ThreadedWorker(Worker):
    """The agent's own lane with its threads, on a bench whose clock stands still meanwhile."""

    def __init__(self, name: str, late_after_s: float, kernel: FakeKernel, clock: Clock) -> None:
        super().__init__(name, late_after_s)
        self._kernel = kernel
        self._clock = clock

    def _start(self, words: str, function: Callable[[], T]) -> asyncio.Future[T]:
        future: asyncio.Future[T] = self._clock.create_future()

        def locked() -> T:
            with self._kernel.lock:
                return function()

        def begin() -> None:
            self._clock.threads += 1
            super(ThreadedWorker, self)._start(words, locked).add_done_callback(end)

        def end(call: asyncio.Future[T]) -> None:
            self._clock.threads -= 1
            error = call.exception()
            if isinstance(error, HangsError):
                self._clock.call_later(error.seconds, begin)
            elif error is not None:
                future.set_exception(error)
            else:
                future.set_result(call.result())

        begin()
        return future


class FakeUnits:
    """A service manager that notes what it was asked, and what was mounted then."""

    def __init__(self, bench: Bench) -> None:
        self.started: list[tuple[str, list[str]]] = []
        self.takes_s = 0.0
        """How long a unit takes to its end."""
        self._bench = bench

    def start(self, unit: str) -> None:
        points = [mount.point for mount in self._bench.kernel.mounts]
        self.started.append((unit, points))

    async def finish(self, unit: str, within_s: float) -> None:
        self.start(unit)
        await asyncio.sleep(min(self.takes_s, within_s))


class Bench:
    """One machine: a kernel, and an agent that can be started, stopped, cancelled and killed."""

    def __init__(self, rules: tuple[Rule, ...] = BUILT_IN, *, threads: bool = False) -> None:
        """`threads`: every call of the agent is in a thread, as it is outside of tests."""
        self._threads = threads
        self.kernel = FakeKernel()
        self.rules = rules
        self.registry = StatusRegistry()
        self.units = FakeUnits(self)
        self.untold: set[str] = set()
        """Names of devices of which udev has not told when an agent starts."""
        self.states: list[tuple[Volume, State, str]] = []
        self._loop = Clock()
        self._runner = asyncio.Runner(loop_factory=lambda: self._loop)
        self._main: asyncio.Task[None] | None = None
        self._process: FakeProcess | None = None
        self._supervisor: Supervisor | None = None
        self._socket: list[tuple[Event, list[Appeared]]] = []

    def close(self) -> None:
        """No loop is left."""
        self._runner.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The coroutine's result, on this bench's loop."""
        return self._runner.get_loop().run_until_complete(coroutine)

    def turns(self, count: int) -> None:
        """The loop has gone round so many times."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(turn())

    def settle(self) -> None:
        """Nothing happens any more that is not waiting for the outside, or for time to pass."""
        self.run(self._loop.settled())

    def wait(self, seconds: float) -> None:
        """So much time has passed, and all that it brought about has happened."""
        self.run(asyncio.sleep(seconds))
        self.settle()

    def start(self) -> None:
        """An agent has been started; it has not had a turn yet."""
        if self._process is not None:
            self._process.die()  # the process before this one has ended
        self._process = self.kernel.process()
        self.registry = StatusRegistry()
        self.registry.listen(lambda e: self.states.append((e.volume, e.state, e.reason)))
        context = self._context = self._new_context(self._process)
        kernel = self.kernel

        async def main() -> None:
            left = await find_leftovers(
                context.kernel, context.new_worker("sweep"), context.dm_worker
            )
            async with Supervisor(context, left) as supervisor:
                present = [medium.volume for medium in kernel.media.values()]
                told = [Appeared(volume) for volume in present if volume.name not in self.untold]
                supervisor.start(told, present)
                self._supervisor = supervisor
                self._read_socket(supervisor)
                await asyncio.Event().wait()

        async def create() -> asyncio.Task[None]:
            return asyncio.create_task(main())

        self._supervisor = None
        self._socket.clear()
        self._main = self.run(create())

    def tell_to_stop(self) -> None:
        """The agent was told to stop; it has not had a turn since."""
        if self._supervisor is None:
            self.settle()
        assert self._supervisor is not None
        self._supervisor.stop()

    def ask_to_stop(self) -> None:
        """The agent was told to stop, and has done of it what takes no time."""
        self.tell_to_stop()
        self.settle()

    def stop(self) -> None:
        """The agent was told to stop, and has ended."""
        self.ask_to_stop()
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
        assert self._process is not None
        self._process.die()
        main, self._main = self._main, None
        assert main is not None

        async def ended() -> None:
            main.cancel()
            await asyncio.wait({main})
            if not main.cancelled():
                main.exception()

        self.run(ended())

    @property
    def has_failed(self) -> bool:
        """Whether the agent has ended by itself."""
        return self._main is not None and self._main.done()

    def failed_to_start(self) -> BaseException:
        """Why the agent has ended by itself."""
        assert self._main is not None
        main, self._main = self._main, None
        error = main.exception()
        assert error is not None
        return error

    @property
    def serving(self) -> bool:
        """Whether an agent runs and has begun to serve volumes."""
        return self._main is not None and self._supervisor is not None

    @property
    def running(self) -> bool:
        """Whether an agent runs."""
        return self._main is not None

    def appear(self, volume: Volume) -> None:
        """The agent hears of the volume, if it listens already."""
        self._take(Appeared(volume))

    def announce(self, volume: Volume) -> None:
        """The agent hears from the kernel that the volume is there."""
        told = replace(
            volume, partuuid=None, parttype=None, label=None, uuid=None, path=None,
            opted_out=False, identified=False, awaits_udev=True,
        )  # fmt: skip
        self._take(Announced(told))

    def insert(self, label: str = "cartridge-01", name: str = "sda1", **facts: Any) -> Volume:
        """A medium was inserted, and the agent hears of it."""
        volume = self.kernel.insert(label, name, **facts)
        self.appear(volume)
        return volume

    def yank(self, name: str = "sda1") -> None:
        """The medium was pulled, and the agent hears of it."""
        self.kernel.yank(name)
        self._take(Disappeared(name))

    def yanked(self, name: str = "sda1") -> None:
        """The agent hears, perhaps once more, that nothing sits there."""
        self._take(Disappeared(name))

    def ask(self, verb: str, volume: Volume, **more: Any) -> asyncio.Task[Any]:
        """Somebody has asked this of the volume; nothing has been done of it yet."""
        assert self._supervisor is not None
        asked = getattr(self._supervisor, verb)(volume.id, "uid 0", **more)

        async def create() -> asyncio.Task[Any]:
            return asyncio.create_task(asked)

        return self.run(create())

    def answer(self, verb: str, volume: Volume, **more: Any) -> Any:
        """What was answered to that. Raises: RequestRefusedError."""
        task = self.ask(verb, volume, **more)
        self.settle()
        return self.run(self._answer_of(task))

    @staticmethod
    async def _answer_of(task: asyncio.Task[Any]) -> Any:
        return await task

    def renew(self, *rules: Rule) -> None:
        """Other rules are in force."""
        assert self._supervisor is not None
        self.rules = rules
        self._supervisor.reevaluate(rules)
        self.settle()

    def blob(self, name: str) -> None:
        """The blob is there, and the agent hears of it."""
        assert self._supervisor is not None
        self.kernel.blobs[name] = KEY
        self._supervisor.blob_appeared(name)
        self.settle()

    def entry(self, volume: Volume) -> Entry:
        """All that the board says of the volume."""
        return next(entry for entry in self.registry.entries() if entry.volume.id == volume.id)

    def lose_events(self, *, listed: bool = True) -> None:
        """The agent hears that it has not heard everything; perhaps udev lists nothing now."""
        self._take(EventsLost(), listed=listed)

    def _take(self, event: Event, *, listed: bool = True) -> None:
        if self._main is None:
            return
        media = self.kernel.media.values() if listed else ()
        self._socket.append((event, [Appeared(medium.volume) for medium in media]))
        supervisor = self._supervisor
        if supervisor is None:
            return  # events wait in the socket until the agent has enumerated

        async def take() -> None:
            self._read_socket(supervisor)

        self.run(take())

    def _read_socket(self, supervisor: Supervisor) -> None:
        while self._socket:
            supervisor.take(*self._socket.pop(0))

    def state(self, volume: Volume) -> State:
        """What the board says of the volume; GONE if nothing."""
        entries = {entry.volume.id: entry.state for entry in self.registry.entries()}
        return entries.get(volume.id, State.GONE)

    def said(self, volume: Volume) -> str:
        """The reason that stands beside the volume's state."""
        return next(e.reason for e in self.registry.entries() if e.volume.id == volume.id)

    def _new_context(self, process: FakeProcess) -> Context:
        """What lives share."""
        kernel, clock = self.kernel, self._loop

        def new_worker(name: str) -> Worker:
            if self._threads:
                return ThreadedWorker(name, LATE_AFTER_S, kernel, clock)
            return InlineWorker(name, LATE_AFTER_S, kernel)

        worker = new_worker("mappings")
        return Context(
            process,
            self.rules,
            new_worker,
            worker,
            MountPoints(),
            self.registry.publish,
            self.units,
        )

    def memories(self) -> dict[str, int]:
        """How many entries the agent's tables have, and the loop tasks."""
        supervisor = self._supervisor
        assert supervisor is not None
        return {
            "lifecycles": len(supervisor._lifecycles),
            "names of volumes": len(supervisor._at),
            "volumes that come next": len(supervisor._next),
            "with leftovers": len(supervisor._with_leftovers),
            "parked": len(supervisor._parked),
            "reserved mount points": len(self._context.mount_points._queues),
            "tasks": len(asyncio.all_tasks(self._loop)),
        }


__all__ = ["Bench", "InlineWorker", "ProcessDiedError"]
