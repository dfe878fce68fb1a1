"""pytest fixtures of the test bed, which a conftest.py imports by name.

The bed's modules are imported when a test asks for a guest, so that this module also loads where
there is no QEMU.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from vm.guest import Guest

LOOKED_AT: Final = {
    "journal": "journalctl -b --no-pager -o short-precise | tail -n 150",
    "kernel log": "dmesg | tail -n 60",
    "mappings": "dmsetup table; dmsetup info -c",
    "mounts": "cat /proc/self/mountinfo",
    "keys": "cat /proc/keys",
    "block devices": "lsblk -o NAME,MAJ:MIN,TYPE,PARTLABEL,MOUNTPOINTS",
}
"""What a failed test's report shows of its guest, and how it is asked for."""

_call: Final = pytest.StashKey[pytest.TestReport]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A fixture can see on its way out whether the test failed, and add to the report."""
    report = yield
    if report.when == "call":
        item.stash[_call] = report
    return report


@pytest.fixture
async def guest(request: pytest.FixtureRequest) -> AsyncIterator[Guest]:
    """A guest restored for this test alone; its logs go into the report of a failed test."""
    from vm import machine

    async with machine.restored() as restored:
        yield restored
        await passed(request, restored)


async def passed(request: pytest.FixtureRequest, guest: Guest) -> bool:
    """Whether the test has passed; if not, its report has what there is to see in the guest."""
    report = request.node.stash.get(_call, None)
    if report is None or not report.failed:
        return report is not None
    report.sections += await evidence(guest)
    return False


async def evidence(guest: Guest) -> list[tuple[str, str]]:
    """What there is to see in a guest after a failure, as sections of a report."""
    sections = []
    for title, script in LOOKED_AT.items():
        try:
            seen = (await guest.sh(f"{script} 2>&1", check=False, timeout_s=30)).stdout
        except Exception as error:  # the guest may be what broke; the rest is still of use
            seen = f"not to be had: {error}"
        sections.append((f"guest: {title}", seen))
    return [*sections, ("guest: console", guest.console()[-4000:])]
