"""Blocking calls in threads, one after the other, never abandoned."""

from __future__ import annotations

import asyncio
import errno
import math
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

from caam_hotplug.errors import HotplugError, KernelError, ReleaseError

T = TypeVar("T")

Late = Callable[[str | None], None]
"""Called with the reason when something takes long, and with None when it has ended."""

_UNOBSERVED: Final = nullcontext()
_MOMENT_S: Final = 0.2
"""Longer than most calls, and the time between two calls for one volume."""


class Observe(Protocol):
    """Called when something begins; the context lasts until it ends. Any thread."""

    def __call__(self, words: str, waiting: str = "") -> AbstractContextManager[None]:
        """`waiting`: the worker that the loop waits for; empty if the calling thread acts."""
        ...


def unobserved(words: str, waiting: str = "") -> AbstractContextManager[None]:
    """Observe nothing."""
    return _UNOBSERVED


async def to_the_end(release: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """Run the release to its end, however often the waiting task is cancelled meanwhile.

    A release has several operations; one cut off between two of them would leave something.

    Raises: ReleaseError if a step failed.
    """
    work = asyncio.ensure_future(release(*arguments))
    if await ended(work):
        raise asyncio.CancelledError from work.exception()
    try:
        return work.result()
    except (HotplugError, OSError) as error:
        raise ReleaseError(f"could not release it: {error}") from error
    finally:
        del work  # its error has this frame


async def all_ended(tasks: Collection[asyncio.Task[None]], within_s: float) -> None:
    """Wait until all tasks have ended, at most so long; one that ends may have begun another."""
    clock = asyncio.get_running_loop().time
    end = clock() + within_s
    while tasks and clock() < end:
        await asyncio.wait(list(tasks), timeout=end - clock())


class Threads:
    """Threads for calls, as many as there are calls at a time.

    They are daemon threads: a call that the kernel never finishes cannot keep the process running.
    They inherit the session keyring of the thread that runs the loop. A few stay when they are
    idle, since starting a thread takes longer than many a call.

    Synchronization: loop only.
    """

    def __init__(self, *, idle: int = 0, observe: Observe = unobserved) -> None:
        """`idle`: how many stay when they have nothing to do."""
        self.observe = observe
        self._most_idle = idle
        self._idle: deque[SimpleQueue[_Call]] = deque()
        """Queues that idle threads wait on. A thread adds its own, the loop takes one out."""
        self._begun_at = -math.inf
        """When the last call began, on the loop's clock."""

    async def prepare(self) -> None:
        """Start those that stay, as far as the kernel permits it: the first calls need not then."""
        may_end = threading.Event()
        calls: list[asyncio.Future[bool]] = []
        with suppress(KernelError):
            for _ in range(self._most_idle):
                calls.append(self.start("worker", "get ready", may_end.wait))
        may_end.set()
        await asyncio.gather(*calls)

    def are_at_work(self) -> bool:
        """Return whether a call began a moment ago. One that takes long waits for the kernel."""
        return asyncio.get_running_loop().time() < self._begun_at + _MOMENT_S

    def start(self, name: str, words: str, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run the function in a thread of this name, and return the future of its result.

        Raises: KernelError if the kernel gives no thread, such as at the unit's TasksMax.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        call = (words, function, loop, future)
        self._begun_at = loop.time()
        try:
            self._idle.pop().put(call)
        except IndexError:
            try:
                threading.Thread(target=self._work, args=(call,), name=name, daemon=True).start()
            except RuntimeError as error:  # pthread_create(3) knows no other error here
                raise KernelError("start a thread for", name, errno.EAGAIN) from error
        return future

    def _work(self, call: _Call) -> None:
        mine: SimpleQueue[_Call] = SimpleQueue()
        while True:
            answer = self._result(call)
            stays = len(self._idle) < self._most_idle
            if stays:  # before the answer, since the next call may come right after it
                self._idle.append(mine)
            call[2].call_soon_threadsafe(answer)
            del call, answer  # a waiting frame must not keep the result alive
            if not stays:
                return
            call = mine.get()

    def _result(self, call: _Call) -> Callable[[], None]:
        """Call the function, and return a callback that sets the future on the loop."""
        words, function, _, future = call
        try:
            with self.observe(words):
                return partial(future.set_result, function())
        except BaseException as error:  # noqa: BLE001  handed on, whatever it is
            return partial(future.set_exception, error)
        finally:
            # An error keeps this frame by its traceback. If this frame kept the future, which has
            # the error, all that the three hold would be freed late, by Python's collector only.
            del call, future


_Call = tuple[str, Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


class Worker:
    """Runs blocking calls in threads, at most one at a time."""

    def __init__(self, name: str, late_after_s: float, threads: Threads | None = None) -> None:
        """`threads`: shared with other workers."""
        self.name = name
        self._late_after_s = late_after_s
        self._threads = threads or Threads()
        self._turn = asyncio.Lock()
        self._calls = 0
        """How many calls there are, the one under way and those that wait."""

    @property
    def observe(self) -> Observe:
        """The observer of its calls."""
        return self._threads.observe

    async def run(
        self,
        words: str,
        function: Callable[..., T],
        *arguments: Any,
        late: Late,
        since: Callable[[], float] | None = None,
        **named: Any,
    ) -> T:
        """Run the function in a thread when it is its turn, and return what it returns.

        `words` say what it does. `late` is called with a reason if the call, or the wait for its
        turn, takes longer than this worker allows, and with None when that has ended after all.
        `since`: for a function that does one thing after another, when the present one began, on
        the loop's clock; `late` is called for each that takes too long.

        A blocking call cannot be cut short. Cancellation is therefore absorbed until it has ended,
        and raised then: a release finds everything that the call has acquired.
        """
        with self.observe(words, self.name):
            await self._take_turn(late)
            try:
                call = self._start(words, partial(function, *arguments, **named))
                with self._reported_when_late(late, "the kernel has not answered", since):
                    cancelled = await ended(call)
            finally:
                self._calls -= 1
                self._turn.release()
            try:
                if cancelled:
                    call.exception()  # seen, so that asyncio does not report it as lost
                    raise asyncio.CancelledError
                return call.result()
            finally:
                del call  # its error has this frame

    async def _take_turn(self, late: Late) -> None:
        self._calls += 1
        try:
            if self._calls == 1:  # nothing is to be waited for, so no timer is needed
                await self._turn.acquire()
                return
            why = "it waits for its turn behind another volume's call"
            with self._reported_when_late(late, why):
                await self._turn.acquire()
        except asyncio.CancelledError:
            self._calls -= 1
            raise

    @contextmanager
    def _reported_when_late(
        self, late: Late, why: str, since: Callable[[], float] | None = None
    ) -> Iterator[None]:
        reported = False
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def report() -> None:
            nonlocal reported, timer
            left = 0.0 if since is None else since() + self._late_after_s - loop.time()
            if left <= 0:
                reported = True
                late(f"{why} for {self._late_after_s:g} s; still waiting")
                left = self._late_after_s
            if since is not None:
                timer = loop.call_later(left, report)

        timer = loop.call_later(self._late_after_s, report)
        try:
            yield
        finally:
            timer.cancel()
            if reported:
                late(None)

    def _start(self, words: str, function: Callable[[], T]) -> asyncio.Future[T]:
        """Start the call, and return the future of its result. Raises: KernelError."""
        return self._threads.start(self.name, words, function)


async def ended(call: asyncio.Future[T]) -> bool:
    """Wait until the call has ended; return whether the waiting task was cancelled meanwhile."""
    cancelled = False
    while not call.done():
        waiter = call.get_loop().create_future()  # asyncio.wait() would do, and takes longer
        call.add_done_callback(partial(_wake, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


def _wake(waiter: asyncio.Future[None], _call: asyncio.Future[T]) -> None:
    if not waiter.done():
        waiter.set_result(None)
