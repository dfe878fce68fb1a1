"""Sleeps of the machine are counted; the guest's tests have the clock that a sleep changes."""

from __future__ import annotations

import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from caam_hotplug.kernel import wakeups
from caam_hotplug.kernel.wakeups import Wakeups


def is_readable(watched: Wakeups) -> bool:
    return bool(select.select([watched], [], [], 0)[0])


def timer_left_s(watched: Wakeups) -> int:
    """Return in how many seconds the timer ends; 0 if it does not (timerfd in proc(5))."""
    text = Path(f"/proc/self/fdinfo/{watched._timer}").read_text()
    (left,) = re.findall(r"it_value: \((\d+), \d+\)", text)
    return int(left)


def test_nothing_is_readable_while_nothing_happens() -> None:
    wakeups = Wakeups()
    assert not is_readable(wakeups)
    assert not wakeups.read()
    assert not wakeups.counts_another()
    wakeups.close()


@pytest.mark.parametrize("left_s", [1000, -1000])
def test_nothing_is_readable_near_the_last_time_that_a_long_has(
    monkeypatch: pytest.MonkeyPatch, left_s: int
) -> None:
    latest = int(time.time()) + left_s
    monkeypatch.setattr(wakeups, "_LATEST_S", latest)
    watched = Wakeups()
    assert not is_readable(watched)
    assert timer_left_s(watched) <= max(left_s, 0)
    watched.close()


def test_a_sleep_that_the_clock_did_not_show_is_counted_once(tmp_path: Path) -> None:
    (tmp_path / "success").write_text("3\n")
    wakeups = Wakeups(tmp_path / "success")
    assert not wakeups.counts_another()
    (tmp_path / "success").write_text("4\n")
    assert wakeups.counts_another()
    assert not wakeups.counts_another()
    wakeups.close()


def test_a_kernel_that_cannot_sleep_has_no_count(tmp_path: Path) -> None:
    wakeups = Wakeups(tmp_path / "missing")
    assert not wakeups.counts_another()
    wakeups.close()


def test_a_process_that_was_stopped_may_have_slept() -> None:
    code = (
        "import os, select, signal, time\n"
        "from caam_hotplug.kernel.wakeups import Wakeups\n"
        "w = Wakeups()\n"
        "print('ready', flush=True)\n"
        "print(bool(select.select([w], [], [], 60)[0]), w.read(), w.read(), flush=True)\n"
        "w.close()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        until_waiting(process.pid)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)  # else it may go on before it has stopped
        process.send_signal(signal.SIGCONT)
        assert process.stdout.readline() == b"True True False\n"


def until_waiting(pid: int) -> None:
    """Wait until all its threads sleep in the kernel."""
    end = time.monotonic() + 60
    while True:
        tasks = Path(f"/proc/{pid}/task").glob("*/stat")
        states = {task.read_text().rpartition(")")[2].split()[0] for task in tasks}
        if states == {"S"}:
            return
        assert time.monotonic() < end


def test_its_descriptors_are_closed_at_the_end() -> None:
    before = os.listdir("/proc/self/fd")
    wakeups = Wakeups()
    wakeups.close()
    assert os.listdir("/proc/self/fd") == before
