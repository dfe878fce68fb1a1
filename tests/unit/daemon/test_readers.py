from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any, Final, cast

import pytest

from caam_hotplug.daemon.readers import Readers
from caam_hotplug.daemon.supervisor import Supervisor
from caam_hotplug.errors import KernelError, UnknownError
from caam_hotplug.kernel import card_readers, changed_disk, sysfs
from caam_hotplug.kernel.sysfs import Source
from caam_hotplug.kernel.uevents import Uevent
from caam_hotplug.volume.worker import Worker
from fakes.clock import Clock

Act = Callable[[Readers], Coroutine[Any, Any, None]]
CHANGED: Final = Uevent("change", "sda", {"DISK_MEDIA_CHANGE": "1"})


class Machine:
    """A machine with readers that nobody polls, and the agent's parts beside; it notes all calls.

    It is the supervisor, and the worker of each reader.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.error: KernelError | None = None
        monkeypatch.setattr(sysfs, "block_names", lambda: ["sda", "sda1", "sr0", "dm-0"])
        monkeypatch.setattr(card_readers, "is_unpolled", lambda name: name in {"sda", "sr0", "sdb"})
        monkeypatch.setattr(card_readers, "poll", lambda name: self._call(f"poll {name}"))
        monkeypatch.setattr(changed_disk, "read_table", lambda node: self._call(f"open {node}"))

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if self.error is not None:
            raise self.error

    def take_care(
        self, source: Source, act: Callable[[Readers], Coroutine[Any, Any, None]]
    ) -> None:
        """Take care of the readers during the act, and for a while after it."""

        async def work() -> None:
            async with asyncio.TaskGroup() as group:
                self._group = group
                new_worker = cast("Callable[[str], Worker]", lambda _name: self)
                look_at = lambda name: self.calls.append(f"look at {name}")  # noqa: E731
                readers = Readers(source, cast("Supervisor", self), new_worker, look_at)
                readers.begin()
                await act(readers)
                readers.end()
                await asyncio.sleep(3600)

        with asyncio.Runner(loop_factory=Clock) as runner:
            runner.run(work())

    def run(self, work: Any, *more: Any, **_late: Any) -> Any:
        """Run work of the agent as the supervisor does, or a step as a worker does."""
        if not isinstance(work, str):
            return self._group.create_task(work)
        return self._run_step(*more)

    async def _run_step(self, step: Callable[[], None]) -> None:
        step()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def reported(
    *events: tuple[float, Source, Uevent],
) -> Act:
    """Return an act with these events, each after some seconds, and a minute at the end."""

    async def act(readers: Readers) -> None:
        for after_s, reporter, event in events:
            await asyncio.sleep(after_s)
            readers.reported(reporter, event)
        await asyncio.sleep(60)

    return act


def test_readers_are_polled_where_no_udevd_has_that_done(machine: Machine) -> None:
    added = (Uevent("add", name, {}) for name in ("sdb", "sdc"))
    machine.take_care("kernel", reported(*((0, "kernel", event) for event in added)))
    assert machine.calls == ["poll sda", "poll sdb"]


def test_readers_are_left_to_udev_where_it_runs(machine: Machine) -> None:
    machine.take_care("udev", reported((0, "kernel", Uevent("add", "sdb", {}))))
    assert machine.calls == []


def test_a_changed_card_is_read_at_once_without_udevd(machine: Machine) -> None:
    machine.take_care("kernel", reported((0, "kernel", CHANGED), (5, "kernel", CHANGED)))
    assert machine.calls == ["poll sda", *["open /dev/sda", "look at sda"] * 2]


def test_a_changed_card_is_read_by_udev_if_it_answers(machine: Machine) -> None:
    machine.take_care("udev", reported((0, "kernel", CHANGED), (29, "udev", CHANGED)))
    assert machine.calls == []


def test_a_changed_card_is_read_once_if_udev_does_not_answer(machine: Machine) -> None:
    machine.take_care("udev", reported((0, "kernel", CHANGED), (29, "kernel", CHANGED)))
    assert machine.calls == ["open /dev/sda", "look at sda"]


def test_nothing_is_opened_after_the_end(machine: Machine) -> None:
    async def act(readers: Readers) -> None:
        readers.reported("kernel", CHANGED)

    machine.take_care("udev", act)
    assert machine.calls == []


def test_a_reader_that_fails_is_said_and_looked_at_all_the_same(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.error = KernelError("open", "/dev/sda", errno.ENOMEDIUM)
    machine.take_care("kernel", reported((0, "kernel", CHANGED)))
    assert machine.calls == ["poll sda", "open /dev/sda", "look at sda"]
    assert caplog.messages == ["open /dev/sda: No medium found"] * 2


def test_a_reader_that_cannot_be_seen_is_said(
    machine: Machine, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> bool:
        raise UnknownError("look at", name, errno.EMFILE)

    monkeypatch.setattr(card_readers, "is_unpolled", unknown)
    machine.take_care("kernel", reported())
    assert "a card that is put in may not be noticed" in caplog.text
