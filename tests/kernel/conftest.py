"""The kernel's tests run in a guest, all of them in one pytest there, and show here as themselves.

On the host a guest is restored and pytest started in it for all that were selected. With several
processes that happens at the first of them; with one as soon as the tests are through that have
guests of their own, and it works beside all other tests. What is said of each test here is what the
guest's pytest said of it, phase by phase. There is no skipping: a test that the guest did not run
has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import shlex
import signal
import socket
import subprocess
from collections.abc import Awaitable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from caam_hotplug.kernel import devmapper, error_table, sysfs_tree, uevents
from kernel import real
from kernel.agents import Room, room_of
from kernel.cartridges import Cartridge, Faulty, cartridges
from kernel.provisioning import Bench, bench_with
from kernel.real import RealWorld
from kernel.witness import loop_medium, run
from vm.fixtures import LOOKED_AT, evidence
from vm.installed import AWAIT_UDEV

if TYPE_CHECKING:
    from vm.guest import Completed, Guest

HERE: Final = Path(__file__).parent
WITH_GUESTS: Final = [HERE.with_name("e2e"), HERE.with_name("vm")]
"""Where the other tests are that have guests."""
IN_GUEST: Final = "BED_IN_GUEST" in os.environ
SELECTED: Final = "/var/tmp/kernel-tests/selected"
"""In the guest: the node ids to run, one a line."""
REPORTS: Final = "/var/tmp/kernel-tests/reports"
"""In the guest: a line of JSON for each report, written as it is made."""
GUEST_DEADLINE_S: Final = 5400

LOOKED_AT_EVERY_S: Final = 2
COVERAGE_IN_GUEST: Final = "/var/tmp/coverage"

_run: Final = pytest.StashKey["GuestRun"]()


class GuestRun:
    """The pytest in the guest, and what it has reported so far."""

    def __init__(self, selected: list[str]) -> None:
        self.said = ""
        """Its output once it has ended, or how the guest failed."""
        self.seen: list[tuple[str, str]] = []
        """What there was to see in the guest, if it ended without a report of every test."""
        self._selected = selected
        self._reports: dict[str, list[dict[str, Any]]] = {}
        self._read = 0
        self._ended = False
        self._runner = asyncio.Runner()
        self._held = contextlib.AsyncExitStack()
        self._guest: Guest
        self._pytest: asyncio.Task[Completed]

    def start(self) -> None:
        """Start the guest's run; it goes on by itself, and its tests report its failures."""
        self._runner.run(self._guarded(self._start()))

    def reports_of(self, nodeid: str) -> list[dict[str, Any]]:
        """Return the reports of this test: of all phases, unless the run ended before."""
        self._runner.run(self._guarded(self._until_reported(nodeid)))
        return self._reports.get(nodeid, [])

    def close(self) -> None:
        """The guest is gone, also if the run did not come to its end.

        If all tests have reported, what remains of the run is waited for: its coverage is written
        after the last report.
        """
        if all(map(self._is_through, self._selected)):
            self._runner.run(self._guarded(self._until_ended()))
        self._runner.run(self._held.aclose())
        self._runner.close()

    async def _guarded(self, work: Awaitable[None]) -> None:
        try:
            await work
        except Exception as error:  # whatever it is, it is what every other test has to say
            self._ended = True
            self.said += f"\n{type(error).__name__}: {error}"

    async def _until_reported(self, nodeid: str) -> None:
        while not self._ended and not self._is_through(nodeid):
            await self._look()

    async def _until_ended(self) -> None:
        while not self._ended:
            await self._look()

    def _is_through(self, nodeid: str) -> bool:
        return any(report["when"] == "teardown" for report in self._reports.get(nodeid, []))

    async def _start(self) -> None:
        from vm import machine

        self._guest = guest = await self._held.enter_async_context(machine.restored())
        await guest.write(SELECTED, "\n".join(self._selected).encode())
        await guest.write(REPORTS, b"")
        command = _command(self._selected, covered="COVERAGE_FROM_GUESTS" in os.environ)
        running = guest.sh(command, check=False, timeout_s=GUEST_DEADLINE_S)
        self._pytest = asyncio.create_task(running)
        await asyncio.wait({self._pytest}, timeout=LOOKED_AT_EVERY_S)  # so that it is asked for

    async def _look(self) -> None:
        guest = self._guest
        await asyncio.wait({self._pytest}, timeout=LOOKED_AT_EVERY_S)
        ended = self._pytest.done()
        written = await guest.run("tail", "-c", f"+{self._read + 1}", REPORTS)
        whole, newline, _ = written.stdout.rpartition("\n")
        self._read += len(whole) + len(newline)  # JSON is ASCII
        for line in whole.splitlines():
            report = json.loads(line)
            self._reports.setdefault(report["nodeid"], []).append(report)
        if ended:
            await self._end(guest)

    async def _end(self, guest: Guest) -> None:
        self._ended = True
        done = self._pytest.result()
        self.said = f"{done.stdout}\n{done.stderr}"
        if not all(map(self._is_through, self._selected)):
            self.seen = await evidence(guest)
        if folder := os.environ.get("COVERAGE_FROM_GUESTS"):
            written = (await guest.sh(f"ls -A {COVERAGE_IN_GUEST}")).stdout.split()
            for number, name in enumerate(written):
                data = await guest.read(f"{COVERAGE_IN_GUEST}/{name}")
                (Path(folder) / f".coverage.guest.{os.getpid()}.{number}").write_bytes(data)
        await self._held.aclose()


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """In the guest, only what the host selected is left; on the host, these come last.

    Those with guests of their own come first.
    """
    assert session
    if not IN_GUEST:
        items.sort(key=lambda item: (_is_here(item), not _has_a_guest(item)))
        for item in filter(_is_here, items):  # a test's wait for those before it is no hang
            item.add_marker(pytest.mark.timeout(0), append=False)
        return
    selected = set(Path(SELECTED).read_text().splitlines())
    config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in selected])
    items[:] = [item for item in items if item.nodeid in selected]


def _begin(session: pytest.Session) -> None:
    """On the host, the guest's run has begun, if there is anything for it to run."""
    selected = [item.nodeid for item in session.items if _is_here(item)]
    if not selected or _run in session.config.stash:
        return
    run = session.config.stash[_run] = GuestRun(selected)
    session.config.add_cleanup(run.close)
    run.start()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In the guest, the report is written down, with what there is to see if the test failed."""
    report = yield
    if IN_GUEST:
        if report.failed:
            signal.setitimer(signal.ITIMER_REAL, 0)  # pytest-timeout's: looking takes its time
            report.sections += [(f"guest: {name}", _shown(ask)) for name, ask in LOOKED_AT.items()]
        hook = item.config.hook
        line = json.dumps(hook.pytest_report_to_serializable(config=item.config, report=report))
        with Path(REPORTS).open("a") as file:
            file.write(f"{line}\n")
    return report


def _shown(script: str) -> str:
    try:
        done = subprocess.run(
            ["/bin/bash", "-c", f"{script} 2>&1"], capture_output=True, timeout=30
        )
    except subprocess.TimeoutExpired as error:
        return f"not to be had: {error}"
    return done.stdout.decode(errors="replace")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> bool | None:
    """On the host, the test has run in the guest, and its reports are those made there.

    pytest asks this of every test of the run, also of those outside this folder.
    """
    if IN_GUEST or _has_a_guest(item):
        return None
    is_shared = hasattr(item.config, "workerinput")  # then others may have another process
    if _is_here(item) or not is_shared:
        _begin(item.session)
    if not _is_here(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, item.config.stash[_run]):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_here(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE)


def _has_a_guest(item: pytest.Item) -> bool:
    return any(map(item.path.is_relative_to, WITH_GUESTS))


def _reports(item: pytest.Item, run: GuestRun) -> list[pytest.TestReport]:
    hook = item.config.hook
    reports: list[pytest.TestReport] = [
        hook.pytest_report_from_serializable(config=item.config, data=data)
        for data in run.reports_of(item.nodeid)
    ]
    for report in reports:
        if report.skipped:
            report.outcome = "failed"
            report.longrepr = f"skipped in the guest: {report.longrepr}"
    if not any(report.when == "teardown" for report in reports):
        reports.append(_unreported(item, run))
    return reports


def _unreported(item: pytest.Item, run: GuestRun) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords={},
        outcome="failed",
        longrepr=f"the guest did not finish this test; its pytest said:\n{run.said[-8000:]}",
        when="call",
        sections=run.seen,
    )


def _command(selected: list[str], *, covered: bool) -> str:
    files = dict.fromkeys(f"/src/{nodeid.partition('::')[0]}" for nodeid in selected)
    pytest_itself = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir=/src"]
    marks = ["-m", ""]  # any: these tests are selected already
    command = ["python3", *pytest_itself, "-c", "/src/pyproject.toml", *marks, *files]
    if covered:
        options = ["--branch", "--source=caam_hotplug"]
        options.append(f"--data-file={COVERAGE_IN_GUEST}/.coverage")
        command[1:1] = ["-m", "coverage", "run", *options]
    environment = "BED_IN_GUEST=1 PYTHONPYCACHEPREFIX=/var/tmp/compiled"  # /src is read-only
    environment += " PYTHONPATH=/src/agent:/src/tests"
    environment += f" AWAIT_UDEV={AWAIT_UDEV}"
    return f"mkdir -pm 1777 {COVERAGE_IN_GUEST}; cd /tmp; {environment} {shlex.join(command)}"


@pytest.fixture(scope="session")
def udev_rule() -> Iterator[None]:
    """udev has the agent's rule, without which it would open our mappings."""
    folder = Path("/run/udev/rules.d")
    folder.mkdir(exist_ok=True)
    installed = folder / real.RULE.name
    installed.write_bytes(real.RULE.read_bytes())
    run("udevadm", "control", "--reload")
    yield
    installed.unlink()
    run("udevadm", "control", "--reload")


@pytest.fixture(scope="module")
def formatted(udev_rule: None) -> Iterator[real.Formatted]:
    """A medium with an ext4 filesystem under the key of cartridge-01.bb."""
    with loop_medium(8 << 20) as medium:
        yield real.Formatted(medium)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test has left no mapping, loop device, key, mount, file or semaphore behind."""
    devmapper.ours()  # libdevmapper keeps its control device open from its first call on
    error_table.prepare()  # and so do these
    sysfs_tree.root()
    gc.collect()
    before = real.left_behind()
    yield
    gc.collect()
    assert real.left_behind() == before


@pytest.fixture
def world(formatted: real.Formatted, nothing_left: None, tmp_path: Path) -> Iterator[RealWorld]:
    """The real kernel, with nothing left in it and in the mount root afterwards."""
    formatted.restore()
    made = RealWorld(formatted.medium, tmp_path)
    yield made
    made.close()
    assert list(made.kernel.mount_root.iterdir()) == []


@pytest.fixture(scope="session")
def media(udev_rule: None) -> Iterator[list[Cartridge]]:
    """Two encrypted cartridges, not plugged."""
    with cartridges(["cartridge-01", "cartridge-02"]) as made:
        yield made


@pytest.fixture
def room(media: list[Cartridge], nothing_left: None) -> Iterator[Room]:
    """A room with those media."""
    with room_of(media) as made:
        yield made


@pytest.fixture
def small_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the agent's sockets so small that a few events overflow them."""
    start = uevents.Uevents.__init__

    def small(listener: uevents.Uevents, *arguments: Any) -> None:
        start(listener, *arguments)
        listener._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)

    monkeypatch.setattr(uevents.Uevents, "__init__", small)


@pytest.fixture
def faulty(media: list[Cartridge], nothing_left: None) -> Iterator[Faulty]:
    """A medium that can be made to fail, beside those of the room."""
    with Faulty("cartridge-03", media[0].contents) as made:
        yield made


@pytest.fixture(scope="module")
def disk(udev_rule: None) -> Iterator[Cartridge]:
    """A cartridge that is plugged, of which media are made."""
    with cartridges(["cartridge-05"]) as (made,):
        made.plug()
        made.settle()
        yield made


@pytest.fixture
def bench(disk: Cartridge, nothing_left: None) -> Iterator[Bench]:
    """A bench whose disk is blank."""
    with bench_with(disk) as made:
        yield made
