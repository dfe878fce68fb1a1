"""Doctor checks the kernel of the guest, in a thread: it joins a keyring of its own."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from caam_hotplug.doctor import report, runner
from caam_hotplug.doctor.result import Result, Status


def checked() -> list[Result]:
    """Return the results of all checks."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: list(runner.results(runner._board(None)))).result()


@pytest.mark.usefixtures("udev_rule", "nothing_left")
def test_the_checks_leave_nothing_and_the_self_test_has_the_known_answer() -> None:
    found = checked()
    by_name = {result.check: result.verdict for result in found}
    assert list(by_name) == [check.name for check in runner.CHECKS]
    for name in ("kernel", "dm-crypt", "keys", "caam-device", "known-answer", "udevd"):
        assert by_name[name].status is Status.OK, by_name[name]
    assert by_name["known-answer"].found.endswith("both ways as by cbc(aes-generic)")
    assert report.summary(found).endswith(" ok")
