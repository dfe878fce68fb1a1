from __future__ import annotations

import asyncio
import io
import os
import signal
from collections.abc import Iterator

import pytest

from caam_hotplug.cli import provision
from caam_hotplug.cli.terminal import ProgressLine, interruptible, table
from caam_hotplug.dbus import client
from caam_hotplug.errors import HotplugError


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    with ProgressLine(file := io.StringIO()) as progress:
        progress.show("step")
    assert file.getvalue() == ""
    with ProgressLine(terminal := Terminal()) as progress:
        progress.show("step")
    assert terminal.getvalue() == "\r\x1b[K\x1b[2mstep ...\x1b[0m\r\x1b[K"


def test_progress_has_no_colour_where_none_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    with ProgressLine(terminal := Terminal()) as progress:
        progress.show("step")
    assert terminal.getvalue() == "\r\x1b[Kstep ...\r\x1b[K"


ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(params=ENDS, ids=lambda number: number.name)
def number(request: pytest.FixtureRequest) -> Iterator[signal.Signals]:
    """A signal that ends a program, and its action restored afterwards."""
    before = signal.getsignal(request.param)
    yield request.param
    signal.signal(request.param, before)


def test_a_signal_that_is_ignored_stays_so(number: signal.Signals) -> None:
    signal.signal(number, signal.SIG_IGN)
    with interruptible("migrate cartridge"):
        os.kill(os.getpid(), number)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert signal.getsignal(number) is signal.SIG_IGN


def test_a_signal_while_the_agent_reads_the_rule_ends_the_command(
    monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    before = signal.default_int_handler
    signal.signal(number, before)

    def never_answered(_what: str, _work: object) -> None:
        async def waiting() -> None:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await asyncio.sleep(60)

        asyncio.run(waiting())

    monkeypatch.setattr(client, "run", never_answered)
    with (
        pytest.raises(HotplugError, match=f"/dev/sdb: interrupted by {number.name}; the same"),
        interruptible("provision /dev/sdb"),
    ):
        provision._reload_agent()
    assert signal.getsignal(number) is before


def test_a_tables_columns_are_aligned_but_the_last() -> None:
    assert table([("NAME", "STATE"), ("a", "ok"), ("longer", "bad")]) == [
        "NAME    STATE",
        "a       ok",
        "longer  bad",
    ]
