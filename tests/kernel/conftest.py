"""The kernel's tests run in a guest, all of them in one pytest there, and show here as themselves.

On the host the first of them restores a guest and lets its pytest run all that were selected;
what is said of each test here is what the guest's pytest said of it, phase by phase. There is no
skipping: a test that the guest did not run has failed.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import shlex
import signal
import subprocess
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from caam_hotplug.kernel import devmapper
from kernel import real
from kernel.real import RealWorld
from kernel.witness import loop_medium, run
from vm.fixtures import COVERAGE_IN_GUEST, LOOKED_AT, evidence

if TYPE_CHECKING:
    from vm.guest import Guest

HERE: Final = Path(__file__).parent
IN_GUEST: Final = "BED_IN_GUEST" in os.environ
SELECTED: Final = "/var/tmp/kernel-tests/selected"
"""In the guest: the node ids to run, one a line."""
REPORTS: Final = "/var/tmp/kernel-tests/reports"
"""In the guest: a line of JSON for each report, written as it is made."""
GUEST_DEADLINE_S: Final = 1800

_run: Final = pytest.StashKey["GuestRun"]()


@dataclass(slots=True)
class GuestRun:
    """What came out of the guest's pytest."""

    said: str = ""
    """Its output, or how the guest failed."""
    reports: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    seen: list[tuple[str, str]] = field(default_factory=list)
    """What there was to see in the guest, if a test is without a report."""


def pytest_collection_modifyitems(
    session: pytest.Session, config: pytest.Config, items: list[pytest.Item]
) -> None:
    """In the guest, only what the host selected is left; on the host, no test has a deadline."""
    assert session
    if not IN_GUEST:
        for item in items:
            if _is_here(item):  # the whole guest's run happens within the first one
                item.add_marker(pytest.mark.timeout(0), append=False)
        return
    selected = set(Path(SELECTED).read_text().splitlines())
    config.hook.pytest_deselected(items=[i for i in items if i.nodeid not in selected])
    items[:] = [item for item in items if item.nodeid in selected]


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
    """On the host, the test has run in the guest, and its reports are those made there."""
    if IN_GUEST:
        return None
    stash = item.config.stash
    if _run not in stash:
        selected = [other for other in item.session.items if _is_here(other)]
        stash[_run] = asyncio.run(_guest_run([other.nodeid for other in selected]))
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in _reports(item, stash[_run]):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _is_here(item: pytest.Item) -> bool:
    return item.path.is_relative_to(HERE)


def _reports(item: pytest.Item, run: GuestRun) -> list[pytest.TestReport]:
    hook = item.config.hook
    reports: list[pytest.TestReport] = [
        hook.pytest_report_from_serializable(config=item.config, data=data)
        for data in run.reports.get(item.nodeid, [])
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
        when="teardown" if item.nodeid in run.reports else "call",
        sections=run.seen,
    )


async def _guest_run(selected: list[str]) -> GuestRun:
    from vm import machine

    run = GuestRun()
    try:
        async with machine.restored() as guest:
            await _in_guest(guest, selected, run)
    except Exception as error:  # whatever it is, it is what every test has to say
        run.said += f"\n{type(error).__name__}: {error}"
    return run


async def _in_guest(guest: Guest, selected: list[str], run: GuestRun) -> None:
    from vm.guest import CommandFailedError

    await guest.write(SELECTED, "\n".join(selected).encode())
    await guest.write(REPORTS, b"")
    folder = os.environ.get("COVERAGE_FROM_GUESTS")
    try:
        done = await guest.sh(
            _command(selected, covered=bool(folder)), check=False, timeout_s=GUEST_DEADLINE_S
        )
        run.said = f"{done.stdout}\n{done.stderr}"
    except CommandFailedError as error:  # it was not done in time; what it wrote is there
        run.said = str(error)
    for line in (await guest.read(REPORTS)).decode().splitlines():
        report = json.loads(line)
        run.reports.setdefault(report["nodeid"], []).append(report)
    if not run.reports.keys() >= set(selected):
        run.seen = await evidence(guest)
    if folder:
        await guest.collect(COVERAGE_IN_GUEST, Path(folder), f"kernel.{os.getpid()}")


def _command(selected: list[str], *, covered: bool) -> str:
    files = sorted({f"/src/{nodeid.partition('::')[0]}" for nodeid in selected})
    pytest_itself = ["-m", "pytest", "-p", "no:cacheprovider", "--rootdir=/src"]
    command = ["python3", *pytest_itself, "-c", "/src/pyproject.toml", *files]
    if covered:
        options = ["--branch", "--parallel-mode", "--source-pkgs=caam_hotplug"]
        options.append(f"--data-file={COVERAGE_IN_GUEST}/.coverage")
        command[1:1] = ["-m", "coverage", "run", *options]
    environment = "BED_IN_GUEST=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/src/agent:/src/tests"
    return f"mkdir -p {COVERAGE_IN_GUEST}; cd /tmp; {environment} {shlex.join(command)}"


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
    assert list(made.host.mount_root.iterdir()) == []
