"""The command, and all checks in a row."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator

import pytest

from caam_hotplug.cli.main import main
from caam_hotplug.doctor import runner
from caam_hotplug.doctor.result import Result, Status, ok
from caam_hotplug.errors import HotplugError
from unit.doctor.boards import BoardFiles


def test_doctor_is_for_root(capsys: pytest.CaptureFixture[str]) -> None:
    os.seteuid(65534)
    try:
        assert main(["doctor"]) == 1
    finally:
        os.seteuid(0)
    assert "it needs to be root" in capsys.readouterr().err


def test_every_check_runs_on_an_empty_board(board: BoardFiles) -> None:
    found = list(runner.results(board.board()))
    assert [f.check for f in found if f.verdict.status is Status.FAILURE].count("caam-device") == 1
    assert {f.check for f in found} == {check.name for check in runner.CHECKS}
    for result in found:
        needs_one = result.verdict.status in {Status.WARNING, Status.FAILURE}
        assert bool(result.verdict.remedy) or not needs_one, result


def test_a_check_that_fails_is_unknown_and_the_others_go_on(board: BoardFiles) -> None:
    (board.root / "etc").mkdir()
    (board.root / "etc/fstab").mkdir()
    verdicts = {r.check: r.verdict for r in runner.results(board.board())}
    assert verdicts["fixed-tables"].status is Status.UNKNOWN
    assert "Is a directory" in verdicts["fixed-tables"].found
    assert "service" in verdicts


@pytest.mark.parametrize("is_ignored", [True, False])
def test_a_hangup_ends_it_unless_it_is_ignored(
    monkeypatch: pytest.MonkeyPatch, is_ignored: bool
) -> None:
    def hung_up(_: object) -> Iterator[Result]:
        os.kill(os.getpid(), signal.SIGHUP)
        yield Result("a", "b", ok("c"))

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    monkeypatch.setattr(runner, "results", hung_up)
    signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        if is_ignored:
            assert runner.examine(None, io.StringIO(), as_json=False) == 0
        else:
            with pytest.raises(HotplugError, match="interrupted"):
                runner.examine(None, io.StringIO(), as_json=False)
    finally:
        for number, action in before.items():
            signal.signal(number, action)
