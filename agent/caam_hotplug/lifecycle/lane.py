"""Blocking calls off the loop, one after the other, never abandoned."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

from caam_hotplug.errors import HotplugError, ReleaseError

T = TypeVar("T")


async def to_the_end(release: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """The release has run whole, however often whoever waits for it is cancelled meanwhile.

    A release has several steps; one that ended between two of them would leave something behind.

    Raises: ReleaseError if a step failed.
    """
    work = asyncio.ensure_future(release(*arguments))
    cancelled = False
    while not work.done():
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        raise asyncio.CancelledError from work.exception()
    try:
        work.result()
    except (HotplugError, OSError) as error:
        raise ReleaseError(f"could not let go: {error}") from error


class Lane:
    """A line of calls, each in a thread of its own, at most one at a time.

    The threads are daemons: a call that the kernel never finishes cannot keep the process from
    its end. They inherit the session keyring of the thread that runs the loop.
    """

    def __init__(self, name: str, late_after_s: float) -> None:
        self._name = name
        self._late_after_s = late_after_s
        self._turn = asyncio.Lock()

    async def run(
        self,
        function: Callable[..., T],
        *arguments: Any,
        late: Callable[[bool], None],
        **named: Any,
    ) -> T:
        """What the function returns or raises. `late(True)` is called if it takes longer than
        this lane allows, `late(False)` when such a call has ended after all.

        A blocking call cannot be cut short. Cancellation is therefore absorbed until it has
        ended, and raised then: whoever releases what the call acquired finds it there.
        """
        async with self._turn:
            call = self._begin(partial(function, *arguments, **named))
            cancelled = False
            was_late = False
            while not call.done():
                try:
                    await asyncio.wait({call}, timeout=None if was_late else self._late_after_s)
                except asyncio.CancelledError:
                    cancelled = True
                    continue
                if not call.done():
                    was_late = True
                    late(True)
            if was_late:
                late(False)
            if cancelled:
                call.exception()  # seen, so that asyncio does not report it as lost
                raise asyncio.CancelledError
            return call.result()

    def _begin(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """The future outcome of the function, which runs in a thread from now on."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def work() -> None:
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001  handed on, whatever it is
                loop.call_soon_threadsafe(future.set_exception, error)
            else:
                loop.call_soon_threadsafe(future.set_result, result)

        threading.Thread(target=work, name=self._name, daemon=True).start()
        return future
