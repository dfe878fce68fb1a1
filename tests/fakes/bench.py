"""A bench for volume lifecycles: the real supervisor over a fake kernel in a deterministic loop."""

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
from fakes.by_hand import ByHand
from fakes.clock import Clock
from fakes.kernel import KEY, FakeKernel, FakeProcess, HangsError, ProcessDiedError

T = TypeVar("T")
LATE_AFTER_S = 3.0
"""Longest time of a call that is not late. Time passes only when a test lets it."""


class InlineWorker(Worker):
    """Worker that makes its calls in the loop, one turn later: always in the same order."""

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
            late_s, self._kernel.answer_delay_s = self._kernel.answer_delay_s, 0.0
            if late_s:
                loop.call_later(late_s, answer)
            else:
                answer()

        loop.call_soon(work)
        return future


class ThreadedWorker(Worker):
    """Worker of the agent with real threads. The clock stands still while they run."""

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
    """Service manager that records each request, and which mounts there were at that time."""

    def __init__(self, bench: Bench) -> None:
        self.started: list[tuple[str, list[str]]] = []
        self.duration_s = 0.0
        """Time a unit takes to finish."""
        self._bench = bench

    def start(self, unit: str) -> None:
        points = [mount.point for mount in self._bench.kernel.mounts]
        self.started.append((unit, points))

    async def finish(self, unit: str, within_s: float) -> None:
        self.start(unit)
        await asyncio.sleep(min(self.duration_s, within_s))


class Bench:
    """One machine: a kernel, and an agent to start, stop, cancel and kill."""

    def __init__(self, rules: tuple[Rule, ...] = BUILT_IN, *, threads: bool = False) -> None:
        """With `threads`, make every call of the agent in a thread, as in production."""
        self._threads = threads
        self.kernel = FakeKernel()
        self.rules = rules
        self.registry = StatusRegistry()
        self.units = FakeUnits(self)
        self.unreported_by_udev: set[str] = set()
        """Names of devices that udev has not reported when an agent starts."""
        self.states: list[tuple[Volume, State, str]] = []
        self._loop = Clock()
        self._runner = asyncio.Runner(loop_factory=lambda: self._loop)
        self._main: asyncio.Task[None] | None = None
        self._process: FakeProcess | None = None
        self._supervisor: Supervisor | None = None
        self._socket: list[tuple[Event, list[Appeared]]] = []
        self.kernel.report = self._report
        self.kernel.mounts_changed = lambda: self._observe(lambda s: s.mounts_changed())
        self.kernel.mapping_changed = lambda name: self._observe(
            lambda s: s.observer.mapping_changed(name)
        )
        self.by_hand = ByHand(self.kernel)

    def close(self) -> None:
        """Close the loop."""
        self._runner.close()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Return the coroutine's result, on this bench's loop."""
        return self._runner.get_loop().run_until_complete(coroutine)

    def run_turns(self, count: int) -> None:
        """Run this many turns of the loop."""

        async def turn() -> None:
            for _ in range(count):
                await asyncio.sleep(0)

        self.run(turn())

    def settle(self) -> None:
        """Run the loop until only an outside event or a timer can continue it."""
        self.run(self._loop.until_settled())

    def wait(self, seconds: float) -> None:
        """Let this many seconds pass, and settle."""
        self.run(asyncio.sleep(seconds))
        self.settle()

    def start(self) -> None:
        """Start an agent; run no turn of it yet."""
        if self._process is not None:
            self._process.die()  # the previous process has ended
        self._process = self.kernel.start_process()
        self.registry = StatusRegistry()
        self.registry.listen(lambda e: self.states.append((e.volume, e.state, e.reason)))
        context = self._context = self._new_context(self._process)
        kernel = self.kernel

        async def main() -> None:
            left = await find_leftovers(
                context.kernel, context.new_worker("leftovers"), context.dm_worker
            )
            async with Supervisor(context, left) as supervisor:
                present = [medium.volume for medium in kernel.media.values()]
                reported = [
                    Appeared(volume)
                    for volume in present
                    if volume.name not in self.unreported_by_udev
                ]
                supervisor.start(reported, present)
                self._supervisor = supervisor
                self._read_socket(supervisor)
                await asyncio.Event().wait()

        async def create() -> asyncio.Task[None]:
            return asyncio.create_task(main())

        self._supervisor = None
        self._socket.clear()
        self._main = self.run(create())

    def request_stop(self) -> None:
        """Ask the agent to stop; run no turn of it yet."""
        if self._supervisor is None:
            self.settle()
        assert self._supervisor is not None
        self._supervisor.stop()

    def begin_stop(self) -> None:
        """Ask the agent to stop, and let it do all that takes no time."""
        self.request_stop()
        self.settle()

    def hand_over(self) -> None:
        """Have the agent stop for its next run, and end it."""
        self._context.keeps = True
        self.stop()

    def shut_down(self) -> None:
        """Have the agent stop while the machine goes down, and end it."""
        self._context.keeps = False
        self.stop()

    def stop(self) -> None:
        """Ask the agent to stop, and end it."""
        self.begin_stop()
        self.cancel()

    def cancel(self) -> None:
        """Cancel the agent's task and wait for its end."""
        assert self._main is not None
        main, self._main = self._main, None

        async def ended() -> None:
            main.cancel()
            await asyncio.wait({main})

        self.run(ended())

    def kill(self) -> None:
        """Kill the agent's process; the kernel keeps its objects."""
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
        """Whether the agent has ended without a request."""
        return self._main is not None and self._main.done()

    def take_error(self) -> BaseException:
        """Return the error that ended the agent."""
        assert self._main is not None
        main, self._main = self._main, None
        error = main.exception()
        assert error is not None
        return error

    @property
    def serving(self) -> bool:
        """Whether an agent runs and serves volumes."""
        return self._main is not None and self._supervisor is not None

    @property
    def running(self) -> bool:
        """Whether an agent runs."""
        return self._main is not None

    def appear(self, volume: Volume) -> None:
        """Report the volume to the agent as udev does, if it listens already; its disk agrees."""
        medium = self.kernel.media.get(volume.name)
        if medium is not None and volume.identified:
            medium.relabel(volume)
        self.misreport(volume)

    def misreport(self, volume: Volume) -> None:
        """Report the volume to the agent as udev does, whatever its disk says."""
        self._take(Appeared(volume))

    def announce(self, volume: Volume) -> None:
        """Report the volume to the agent as the kernel does, before udev."""
        announced = replace(
            volume, partuuid=None, parttype=None, label=None, uuid=None, path=None,
            opted_out=False, identified=False, awaits_udev=True,
        )  # fmt: skip
        self._take(Announced(announced))

    def insert(self, label: str = "cartridge-01", name: str = "sda1", **facts: Any) -> Volume:
        """Insert a medium and report it to the agent."""
        volume = self.kernel.insert(label, name, **facts)
        self.appear(volume)
        return volume

    def pull(self, name: str = "sda1") -> None:
        """Pull the medium and report that to the agent, and its disk's departure if it has gone."""
        self.kernel.pull(name)
        self._take(Disappeared(name))
        disk = name.rstrip("0123456789")
        left = {**self.kernel.media, **self.kernel.away}
        if not any(other.startswith(disk) for other in left):
            self._take(Disappeared(disk))

    def report_absent(self, name: str = "sda1") -> None:
        """Report to the agent, perhaps again, that the device is absent."""
        self._take(Disappeared(name))

    def ask(self, verb: str, volume: Volume, **more: Any) -> asyncio.Task[Any]:
        """Send a request about the volume; run no turn of it yet."""
        assert self._supervisor is not None
        asked = getattr(self._supervisor, verb)(volume.id, "uid 0", **more)

        async def create() -> asyncio.Task[Any]:
            return asyncio.create_task(asked)

        return self.run(create())

    def answer(self, verb: str, volume: Volume, **more: Any) -> Any:
        """Return the answer to a request. Raises: RequestRefusedError."""
        task = self.ask(verb, volume, **more)
        self.settle()
        return self.run(self._answer_of(task))

    @staticmethod
    async def _answer_of(task: asyncio.Task[Any]) -> Any:
        return await task

    def reload_rules(self, *rules: Rule) -> None:
        """Put other rules into force."""
        assert self._supervisor is not None
        self.rules = rules
        self._supervisor.reevaluate(rules)
        self.settle()

    def add_blob(self, name: str) -> None:
        """Add a blob file and report it to the agent."""
        assert self._supervisor is not None
        self.kernel.blobs[name] = KEY
        self._supervisor.blob_appeared(name)
        self.settle()

    def report_mounts(self) -> None:
        """Report to the agent that mounts have changed."""
        assert self._supervisor is not None
        self._supervisor.mounts_changed()
        self.settle()

    def look(self, volume: Volume) -> Entry:
        """Have the agent look at a volume, as somebody who reads its state does."""
        assert self._supervisor is not None
        observer = self._supervisor.observer

        async def look() -> None:
            observer.look(volume.id)

        self.run(look())
        self.settle()
        return self.entry(volume)

    def answer_during_look(self, verb: str, volume: Volume, turns: int) -> Any:
        """Return the answer to a request that comes so many turns after it is looked at."""
        assert self._supervisor is not None
        supervisor = self._supervisor

        async def look_and_ask() -> Any:
            supervisor.observer.look(volume.id)
            for _ in range(turns):
                await asyncio.sleep(0)
            return await getattr(supervisor, verb)(volume.id, "uid 0")

        return self.run(look_and_ask())

    def answer_at_start(self, verb: str, volume: Volume, turns: int) -> Any:
        """Start an agent; return the answer to a request so many turns after it has the volume."""
        self.start()

        async def ask() -> Any:
            while self._supervisor is None:
                await asyncio.sleep(0)
            for _ in range(turns):
                await asyncio.sleep(0)
            return await getattr(self._supervisor, verb)(volume.id, "uid 0")

        return self.run(ask())

    def wake(self) -> None:
        """Report to the agent that the machine has slept."""
        assert self._supervisor is not None
        self._supervisor.machine_woke()

    def entry(self, volume: Volume) -> Entry:
        """Return the volume's entry in the status registry."""
        return next(entry for entry in self.registry.entries() if entry.volume.id == volume.id)

    def lose_events(self, *, listed: bool = True) -> None:
        """Report lost events to the agent; without `listed`, udev lists no device now."""
        self._take(EventsLost(), listed=listed)

    def _take(self, event: Event, *, listed: bool = True) -> None:
        if self._main is None:
            return
        media = self.kernel.media.values() if listed else ()
        self._socket.append((event, [Appeared(medium.volume) for medium in media]))
        supervisor = self._supervisor
        if supervisor is None:
            return  # events wait in the socket until the agent has enumerated the devices

        async def take() -> None:
            self._read_socket(supervisor)

        self.run(take())

    def _report(self, event: Event) -> None:
        """Report to the agent, a turn later, what its own call to the kernel has changed."""

        def take() -> None:
            if self._main is not None:
                media = self.kernel.media.values()
                self._socket.append((event, [Appeared(medium.volume) for medium in media]))
                if self._supervisor is not None:
                    self._read_socket(self._supervisor)

        self._loop.call_soon_threadsafe(take)

    def _observe(self, take: Callable[[Supervisor], None]) -> None:
        """Report to the agent, a turn later, what somebody has changed in the kernel."""

        def report() -> None:
            if self._main is not None and self._supervisor is not None:
                take(self._supervisor)

        self._loop.call_soon_threadsafe(report)

    def _read_socket(self, supervisor: Supervisor) -> None:
        while self._socket:
            supervisor.take(*self._socket.pop(0))

    def state(self, volume: Volume) -> State:
        """Return the volume's published state; GONE without an entry."""
        entries = {entry.volume.id: entry.state for entry in self.registry.entries()}
        return entries.get(volume.id, State.GONE)

    def reason(self, volume: Volume) -> str:
        """Return the published reason for the volume's state."""
        return next(e.reason for e in self.registry.entries() if e.volume.id == volume.id)

    def _new_context(self, process: FakeProcess) -> Context:
        """Return a context for the volumes of a new agent."""
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

    def table_sizes(self) -> dict[str, int]:
        """Return the sizes of the agent's tables, and the number of the loop's tasks."""
        supervisor = self._supervisor
        assert supervisor is not None
        return {
            "lifecycles": len(supervisor._lifecycles),
            "names of volumes": len(supervisor._at),
            "volumes that come next": len(supervisor._next),
            "with leftovers": len(supervisor._with_leftovers),
            "parked": len(supervisor._parked),
            "reserved mount points": len(self._context.mount_points._queue),
            "tasks": len(asyncio.all_tasks(self._loop)),
        }


__all__ = ["Bench", "InlineWorker", "ProcessDiedError"]
