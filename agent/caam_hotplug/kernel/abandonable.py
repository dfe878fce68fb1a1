"""Calls that only read, in threads of their own, so that nothing waits for one that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

from caam_hotplug.errors import HotplugError

T = TypeVar("T")


async def run_in_thread(what: str, read: Callable[[], T], within_s: float) -> T:
    """Return the result of the call, which runs in its own thread.

    The call must change nothing, so that it may be abandoned. A worker's call may not be.

    Raises: HotplugError if it takes longer; whatever the call raises.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def settle(set_it: Callable[[Any], None], value: Any) -> None:
        if not outcome.done():
            set_it(value)

    def work() -> None:
        try:
            result = (outcome.set_result, read())
        except BaseException as error:  # noqa: BLE001  passed on to the caller
            result = (outcome.set_exception, error)  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop was closed meanwhile
            loop.call_soon_threadsafe(settle, *result)

    threading.Thread(target=work, name=what, daemon=True).start()
    try:
        async with asyncio.timeout(within_s):
            return await outcome
    except TimeoutError:
        if outcome.done() and not outcome.cancelled():
            raise
        raise HotplugError(f"{what}: no answer within {within_s:g} s") from None
