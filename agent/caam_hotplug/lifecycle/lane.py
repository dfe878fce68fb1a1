"""Blocking calls off the loop, one after the other, never abandoned."""

from __future__ import annotations

import asyncio
import errno
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
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


class Lane:
    """A line of calls, each in a thread of its own, at most one at a time.

    The threads are daemons: a call that the kernel never finishes cannot keep the process from
    its end. They inherit the session keyring of the thread that runs the loop.
    """

    def __init__(self, name: str, late_after_s: float) -> None:
        self.name = name
        self._late_after_s = late_after_s
        self._turn = asyncio.Lock()

    async def run(self, function: Callable[..., T], *arguments: Any, late: Late, **named: Any) -> T:
        """What the function returns or raises.

        `late` is called with a reason if the call, or the wait for its turn before it, takes
        longer than this lane allows, and with None when that has ended after all.

        A blocking call cannot be cut short. Cancellation is therefore absorbed until it has
        ended, and raised then: whoever releases what the call acquired finds it there.
        """
        with self._said_when_late(late, "it waits for its turn behind another volume's call"):
            await self._turn.acquire()
        try:
            call = self._begin(partial(function, *arguments, **named))
            with self._said_when_late(late, "the kernel has not answered"):
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
    def _said_when_late(self, late: Late, why: str) -> Iterator[None]:
        said = False

        def say() -> None:
            nonlocal said
            said = True
            late(f"{why} for {self._late_after_s:g} s; still waiting")

        timer = asyncio.get_running_loop().call_later(self._late_after_s, say)
        try:
            yield
        finally:
            timer.cancel()
            if said:
                late(None)

    def _begin(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """The future outcome of the function, which runs in a thread from now on.

        Raises: KernelError if the kernel gives no thread, such as at the unit's TasksMax.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        try:
            arguments = (function, loop, future)
            threading.Thread(target=_carry_out, args=arguments, name=self.name, daemon=True).start()
        except RuntimeError as error:  # pthread_create(3) knows no other error here
            raise KernelError("start a thread for", self.name, errno.EAGAIN) from error
        return future


def _carry_out(
    function: Callable[[], T], loop: asyncio.AbstractEventLoop, future: asyncio.Future[T]
) -> None:
    """The function has been called, and the loop is told what came of it."""
    try:
        with trace.span(getattr(function, "__name__", "call")):
            result = function()
    except BaseException as error:  # noqa: BLE001  handed on, whatever it is
        loop.call_soon_threadsafe(future.set_exception, error)
    else:
        loop.call_soon_threadsafe(future.set_result, result)
    finally:
        # An error keeps this frame by its traceback. If this frame kept the future, which has the
        # error, all that the three hold would be freed by Python's collector only, and late.
        del future


async def _ended(call: asyncio.Future[T]) -> bool:
    """The call has ended; whether whoever waits for it was cancelled meanwhile."""
    cancelled = False
    while not call.done():
        try:
            await asyncio.wait({call})
        except asyncio.CancelledError:
            cancelled = True
    return cancelled
