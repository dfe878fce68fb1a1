"""The worker that the agent runs with: real threads."""

from __future__ import annotations

import asyncio
import errno
import gc
import threading
import time
import weakref
from contextlib import suppress

import pytest

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.volume.worker import Threads, Worker, all_ended, to_the_end


def unheard(_why: str | None) -> None:
    """Ignore lateness."""


async def test_a_call_without_a_thread_fails_and_the_next_call_has_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    worker = Worker("volume 1-1", 10.0)
    with monkeypatch.context() as patched, pytest.raises(KernelError) as refused:
        patched.setattr(threading.Thread, "start", refuse)
        await worker.run("call", int, late=unheard)
    assert refused.value.errno == errno.EAGAIN
    assert str(refused.value).startswith("start a thread for volume 1-1: ")
    assert await worker.run("call", int, "7", late=unheard) == 7


async def test_a_slow_call_is_reported_and_so_is_the_call_behind_it() -> None:
    worker = Worker("mappings", 0.0)
    may_end = threading.Event()
    of_first: list[str | None] = []
    of_second: list[str | None] = []

    def hear_second(why: str | None) -> None:
        of_second.append(why)
        may_end.set()

    first = asyncio.create_task(worker.run("call", may_end.wait, late=of_first.append))
    second = asyncio.create_task(worker.run("call", int, "7", late=hear_second))
    assert await first
    assert await second == 7
    assert of_first == ["the kernel has not answered for 0 s; still waiting", None]
    assert of_second[:2] == [
        "it waits for its turn behind another volume's call for 0 s; still waiting",
        None,
    ]


async def test_a_caller_that_is_cancelled_while_it_waits_for_a_turn_does_not_call() -> None:
    worker = Worker("mappings", 10.0)
    may_end = threading.Event()
    called: list[str] = []
    first = asyncio.create_task(worker.run("call", may_end.wait, late=unheard))
    second = asyncio.create_task(worker.run("call", called.append, "second", late=unheard))
    third = asyncio.create_task(worker.run("call", called.append, "third", late=unheard))
    await asyncio.sleep(0)
    second.cancel()
    may_end.set()
    assert await first
    await third
    assert second.cancelled()
    assert called == ["third"]


class Held:
    """Something large that a call works with."""


@pytest.mark.parametrize("by", ["itself", "a release"])
async def test_objects_of_a_failed_call_are_freed_without_the_garbage_collector(by: str) -> None:
    worker = Worker("volume 1-1", 10.0)
    seen: list[weakref.ref[Held]] = []

    def fail() -> None:
        held = Held()
        seen.append(weakref.ref(held))
        raise KernelError("mount", "/dev/dm-0", errno.EIO)

    async def attempt() -> None:
        await worker.run("call", fail, late=unheard)

    gc.disable()
    try:
        with suppress(HotplugError):
            await (attempt() if by == "itself" else to_the_end(attempt))
        for thread in threading.enumerate():
            if thread.name == "volume 1-1":
                thread.join()
        await asyncio.sleep(0)  # the loop releases its last callback
        assert seen[0]() is None
    finally:
        gc.enable()


async def test_a_caller_that_comes_when_the_worker_is_free_for_another_waits() -> None:
    worker = Worker("mappings", 0.05)
    may_end = threading.Event()
    reasons: list[str | None] = []

    def hear(why: str | None) -> None:
        reasons.append(why)
        may_end.set()

    async def two_in_a_row() -> None:
        await worker.run("call", time.sleep, 0.02, late=unheard)
        await worker.run("call", int, late=hear)

    first = asyncio.create_task(two_in_a_row())
    await asyncio.sleep(0)
    second = asyncio.create_task(worker.run("call", may_end.wait, late=unheard))
    await asyncio.gather(first, second)
    assert reasons[0] is not None
    assert reasons[0].startswith("it waits for its turn")


async def test_threads_that_are_prepared_are_there_for_the_first_calls() -> None:
    threads, may_end = Threads(idle=2), threading.Event()
    await threads.prepare()
    there = {thread.ident for thread in threading.enumerate()}

    def call() -> int:
        may_end.wait()
        return threading.get_ident()

    calls = [threads.start("call", "call", call) for _ in range(2)]
    may_end.set()
    assert set(await asyncio.gather(*calls)) <= there


async def test_threads_are_at_work_for_a_moment_after_a_call_began(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    threads = Threads()
    assert not threads.are_at_work()
    now = 100.0
    monkeypatch.setattr(asyncio.get_running_loop(), "time", lambda: now)
    await Worker("volume", 10, threads).run("call", int, late=unheard)
    assert threads.are_at_work()
    now += 1
    assert not threads.are_at_work()


def test_a_task_that_another_one_begins_at_its_end_is_waited_for() -> None:
    async def work() -> list[str]:
        tasks: set[asyncio.Task[None]] = set()
        ended: list[str] = []

        def begin(name: str, then: str) -> None:
            async def run() -> None:
                await asyncio.sleep(0)
                ended.append(name)
                if then:
                    begin(then, "")

            task = asyncio.create_task(run())
            tasks.add(task)
            task.add_done_callback(tasks.discard)

        begin("first", "second")
        await all_ended(tasks, 60)
        return ended

    assert asyncio.run(work()) == ["first", "second"]


def test_tasks_that_do_not_end_are_waited_for_no_longer_than_that() -> None:
    async def work() -> bool:
        task = asyncio.create_task(asyncio.Event().wait())
        await all_ended([task], 0.01)  # type: ignore[list-item]
        return task.cancel()

    assert asyncio.run(work())
