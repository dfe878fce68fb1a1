"""Blocking calls off the loop, one after the other, never abandoned."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from caam_hotplug import trace
from caam_hotplug.errors import HotplugError, KernelError, ReleaseError

T = TypeVar("T")

Late = Callable[[str | None], None]
"""Told why something takes long, and None when it has ended."""


async def to_the_end(release: Callable[..., Awaitable[T]], *arguments: Any) -> T:
    """The release's result. It has run whole, however often whoever waits is cancelled meanwhile.

    A release has several steps; one that ended between two of them would leave something behind.

    Raises: ReleaseError if a step failed.
    """
    work = asyncio.ensure_future(release(*arguments))
    if await _ended(work):
        raise asyncio.CancelledError from work.exception()
    try:
        return work.result()
    except (HotplugError, OSError) as error:
        raise ReleaseError(f"could not let go: {error}") from error
    finally:
        del work  # its error has this frame


class Threads:
    """Threads that carry out calls, as many as there are calls at a time.

    They are daemons: a call that the kernel never finishes cannot keep the process from its end.
    They inherit the session keyring of the thread that runs the loop. A few of them stay when they
    have nothing to do: to start one takes longer than many a call.

    Synchronization: loop only.
    """

    def __init__(self, *, idle: int = 0) -> None:
        """`idle`: how many stay."""
        self._most_idle = idle
        self._idle: deque[SimpleQueue[_Call]] = deque()
        """What an idle thread waits for. A thread adds its own, the loop takes."""

    def carry_out(self, name: str, function: Callable[[], T]) -> asyncio.Future[T]:
        """The future outcome of the function, which runs in a thread from now on.

        Raises: KernelError if the kernel gives no thread, such as at the unit's TasksMax.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        call = (function, loop, future)
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
            answer = _outcome(call)
            stays = len(self._idle) < self._most_idle
            if stays:  # before the answer, which the next call may follow at once
                self._idle.append(mine)
            call[1].call_soon_threadsafe(answer)
            del call, answer  # while it waits, this frame keeps nothing of what was done
            if not stays:
                return
            call = mine.get()


_Call = tuple[Callable[[], Any], asyncio.AbstractEventLoop, "asyncio.Future[Any]"]


def _outcome(call: _Call) -> Callable[[], None]:
    """The function has been called; what tells the loop what came of it."""
    function, _, future = call
    try:
        with trace.span(getattr(function, "__name__", "call")):
            return partial(future.set_result, function())
    except BaseException as error:  # noqa: BLE001  handed on, whatever it is
        return partial(future.set_exception, error)
    finally:
        # An error keeps this frame by its traceback. If this frame kept the future, which has the
        # error, all that the three hold would be freed by Python's collector only, and late.
        del call, future


class Worker:
    """A line of calls, each in a thread, at most one at a time."""

    def __init__(self, name: str, late_after_s: float, threads: Threads | None = None) -> None:
        """`threads`: shared with other lanes."""
        self.name = name
        self._late_after_s = late_after_s
        self._threads = threads or Threads()
        self._turn = asyncio.Lock()

    async def run(
        self,
        function: Callable[..., T],
        *arguments: Any,
        late: Late,
        since: Callable[[], float] | None = None,
        **named: Any,
    ) -> T:
        """What the function returns or raises.

        `late` is called with a reason if the call, or the wait for its turn before it, takes
        longer than this lane allows, and with None when that has ended after all. `since`: when
        what the call does now began, on the loop's clock, if it does one thing after another; for
        each that takes too long `late` is called.

        A blocking call cannot be cut short. Cancellation is therefore absorbed until it has
        ended, and raised then: whoever releases what the call acquired finds it there.
        """
        with self._said_when_late(late, "it waits for its turn behind another volume's call"):
            await self._turn.acquire()
        try:
            call = self._begin(partial(function, *arguments, **named))
            with self._said_when_late(late, "the kernel has not answered", since):
                cancelled = await _ended(call)
        finally:
            self._turn.release()
        try:
            if cancelled:
                call.exception()  # seen, so that asyncio does not report it as lost
                raise asyncio.CancelledError
            return call.result()
        finally:
            del call  # its error has this frame

    @contextmanager
    def _said_when_late(
        self, late: Late, why: str, since: Callable[[], float] | None = None
    ) -> Iterator[None]:
        said = False
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def say() -> None:
            nonlocal said, timer
            left = 0.0 if since is None else since() + self._late_after_s - loop.time()
            if left <= 0:
                said = True
                late(f"{why} for {self._late_after_s:g} s; still waiting")
                left = self._late_after_s
            if since is not None:
                timer = loop.call_later(left, say)

        timer = loop.call_later(self._late_after_s, say)
        try:
            yield
        finally:
            timer.cancel()
            if said:
                late(None)

    def _begin(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """The future outcome of the function, which runs from now on. Raises: KernelError."""
        return self._threads.carry_out(self.name, function)


async def _ended(call: asyncio.Future[T]) -> bool:
    """The call has ended; whether whoever waits for it was cancelled meanwhile."""
    cancelled = False
    while not call.done():
        waiter = call.get_loop().create_future()  # asyncio.wait() would do, with more ado
        call.add_done_callback(partial(_wake, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            cancelled = True
    return cancelled


def _wake(waiter: asyncio.Future[None], _call: asyncio.Future[T]) -> None:
    if not waiter.done():
        waiter.set_result(None)
