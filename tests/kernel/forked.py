"""The whole agent in a process forked from the tests', which avoids a slow start in the guest.

Its calls to the kernel can be watched one by one, and the agent stopped at each: the process is
killed there, or held until the test releases it. The product has no code for that: the child
wraps its bindings before it starts.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import re
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from caam_hotplug.config.loader import Config
from caam_hotplug.daemon import main as daemon
from caam_hotplug.kernel import ctypes_lib

DEADLINE_S: Final = 120

_SYSCALLS: Final = frozenset({"move_mount", "fsopen", "fsconfig", "fsmount"})
_FUNCTIONS: Final = frozenset({"add_key", "keyctl_unlink", "umount2", "syncfs", "dm_task_run"})
_METHODS: Final = ((fcntl, "ioctl"), (os, "mkdir"), (os, "rmdir"))
_QUESTIONS: Final = {0x1268, 0x80081280, 0xC138FD0C}
"""Requests of ioctl that change nothing: BLKSSZGET and BLKGETDISKSEQ of linux/fs.h, DM_TABLE_STATUS
of linux/dm-ioctl.h."""
_TASKS: Final = {0: "dm create", 1: "dm load", 2: "dm remove", 5: "dm resume", 17: "dm message"}


@dataclass(frozen=True, slots=True)
class Stop:
    """Action of the agent's process after a number of calls since it was ready."""

    after: int
    act: Callable[[], None] | None = None
    """Run by the thread that made the call; None holds the thread until `Agent.go_on`."""


def kill_self() -> None:
    """End as `kill -9` ends a process: nothing of it runs afterwards."""
    os.kill(os.getpid(), signal.SIGKILL)


class Agent:
    """A process that runs the agent. The test notices its end and reads its log."""

    def __init__(self, load: Callable[[], Config], notify: Path) -> None:
        """`load` reads its configuration; `notify` is the path of its service manager's socket."""
        self._load = load
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._manager.bind(str(notify))
        self._manager.settimeout(DEADLINE_S)
        self._pid = 0
        self._log = self._reports = self._go = -1
        self._unread = b""
        self.log_lines: list[str] = []
        """Lines that it has logged since the last start."""
        self._lines_read = 0
        self._calls = b""

    def start(self, stop: Stop | None = None) -> None:
        """Start it and wait until it is ready; `until_said` considers all lines since the start."""
        self.begin(stop)
        self.until_said("^ready: ")
        self._lines_read = 0

    def begin(self, stop: Stop | None = None) -> None:
        """Start it without waiting until it is ready; it adopts what is there."""
        self._end_of_pipes()
        self._log, log = os.pipe()
        self._reports, reports = os.pipe()
        go, self._go = os.pipe()
        self.log_lines, self._unread, self._lines_read, self._calls = [], b"", 0, b""
        gc.freeze()  # so the child's collector does not touch shared memory
        self._pid = os.fork()
        if self._pid == 0:
            os.environ["NOTIFY_SOCKET"] = self._manager.getsockname()
            os.environ["WATCHDOG_USEC"] = "1000000"
            _be_the_agent(self._load, log, Watch(reports, go, stop))
        for end in (log, reports, go):
            os.close(end)

    @property
    def pid(self) -> int:
        """Process ID."""
        return self._pid

    @property
    def calls(self) -> list[str]:
        """Calls since it was ready that changed something, in their order."""
        self._read_calls()
        return self._calls.decode().splitlines()

    def _read_calls(self) -> None:
        while select.select([self._reports], [], [], 0)[0] and (
            more := os.read(self._reports, 65536)
        ):
            self._calls += more

    def until_called(self, count: int) -> None:
        """Wait until it has made this many calls. Raises: AssertionError after the deadline."""
        end = time.monotonic() + DEADLINE_S
        while len(self.calls) < count:
            select.select([self._reports], [], [], 1)
            assert time.monotonic() < end, f"only {self.calls}; {self.log_lines}"

    def until_pinged(self, times: int) -> None:
        """Wait until it has pinged the service manager's watchdog this many times from now on.

        Raises: TimeoutError after the deadline.
        """
        while select.select([self._manager], [], [], 0)[0]:
            self._manager.recv(4096)
        while times:
            times -= self._manager.recv(4096) == b"WATCHDOG=1"

    def go_on(self) -> None:
        """Release it where it is held."""
        os.write(self._go, b"g")

    def until_said(self, pattern: str) -> str:
        """Return the next unread log line that matches; wait for it.

        Raises: AssertionError after the deadline, or when the process has ended before.
        """
        end = time.monotonic() + DEADLINE_S
        while True:
            for index in range(self._lines_read, len(self.log_lines)):
                if re.search(pattern, self.log_lines[index]):
                    self._lines_read = index + 1
                    return self.log_lines[index]
            assert self._read(end), f"not logged: {pattern}\n" + "\n".join(self.log_lines)

    def until_said_ever(self, pattern: str) -> str:
        """Return its first matching log line. Raises: AssertionError after the deadline."""
        self._lines_read = 0
        return self.until_said(pattern)

    def forget(self) -> None:
        """Ignore all log lines so far.

        This also reads the reported calls: the agent would block on a full pipe.
        """
        self._read_calls()
        while self._read(time.monotonic()):
            pass
        self._lines_read = len(self.log_lines)

    def _read(self, end: float) -> bool:
        """Read some more of its log; return whether there was any."""
        if not select.select([self._log], [], [], max(0, end - time.monotonic()))[0]:
            return False
        more = os.read(self._log, 65536)
        *lines, self._unread = (self._unread + more).split(b"\n")
        self.log_lines += [line.decode().split(">", 1)[-1] for line in lines]
        return bool(more)

    def until_killed(self) -> None:
        """Wait until it has killed itself. Raises: AssertionError after the deadline."""
        status = self._status()
        assert os.WIFSIGNALED(status), self.everything()
        assert os.WTERMSIG(status) == signal.SIGKILL, self.everything()

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        os.kill(self._pid, signal.SIGKILL)
        self.until_killed()

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Suspend the process meanwhile, so that it reads no event."""
        os.kill(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def request_stop(self) -> None:
        """Ask it to stop."""
        os.kill(self._pid, signal.SIGTERM)

    def request_reload(self) -> None:
        """Ask it to read its configuration again."""
        os.kill(self._pid, signal.SIGHUP)

    def stop(self) -> None:
        """Ask it to stop, and wait for its end."""
        self.request_stop()
        self.until_ended()

    def until_ended(self, status: int = 0) -> None:
        """Wait for its end with this exit status. Raises: AssertionError after the deadline."""
        assert os.waitstatus_to_exitcode(self._status()) == status, self.everything()

    def _status(self) -> int:
        ended = os.pidfd_open(self._pid)
        try:
            assert select.select([ended], [], [], DEADLINE_S)[0], self.everything()
        finally:
            os.close(ended)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        return status

    def everything(self) -> str:
        """Return its whole log."""
        self.forget()
        return "\n".join(self.log_lines)

    def close(self) -> None:
        """End the process, and release everything it used."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        self._end_of_pipes()
        self._manager.close()

    def _end_of_pipes(self) -> None:
        for end in (self._log, self._reports, self._go):
            if end >= 0:
                os.close(end)
        self._log = self._reports = self._go = -1


def _be_the_agent(load: Callable[[], Config], log: int, watch: Watch) -> None:
    """Run the agent and never return: the cleanup of a test's process is not this process's."""
    code = 1
    try:
        os.dup2(log, 2)
        sys.settrace(None)  # the coverage of a killed process is never written
        threading.settrace(None)
        os.environ["JOURNAL_STREAM"] = ""  # so each line begins with <PRIORITY>
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115  for good
        watch.install()
        daemon.run(load)
        code = 0
    except BaseException:
        for line in traceback.format_exc().splitlines():
            print(f"<3>{line}", file=sys.stderr)
    finally:
        os._exit(code)


class Watch:
    """Reports each call that changes something, once the agent is ready, and can stop it there."""

    def __init__(
        self,
        reports: int,
        go: int,
        stop: Stop | None,
        functions: frozenset[str] = _FUNCTIONS,
        methods: Sequence[tuple[Any, str]] = _METHODS,
    ) -> None:
        """`functions` and `methods`: those of C and of Python's modules that change something."""
        self._functions = functions
        self._methods = methods
        self._reports = reports
        self._go = go
        self._stop = stop
        self._kinds: dict[int, int] = {}
        self._count = 0

    def install(self) -> None:
        """Wrap the process's calls."""
        call, noted = ctypes_lib.Function.__call__, self._functions | _SYSCALLS

        def watched(function: ctypes_lib.Function, *arguments: Any) -> Any:
            result = call(function, *arguments)
            errno, name = ctypes.get_errno(), function.name
            if name == "dm_task_create":
                self._kinds[result] = arguments[0]
            if name in noted:
                is_task = name == "dm_task_run"
                self._made(_TASKS.get(self._kinds[arguments[0]]) if is_task else name)
            ctypes.set_errno(errno)
            return result

        ctypes_lib.Function.__call__ = watched  # type: ignore[method-assign, assignment]
        for module, name in self._methods:
            setattr(module, name, self._watched(name, getattr(module, name)))

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **named: Any) -> Any:
            result = function(*arguments, **named)
            errno = ctypes.get_errno()
            if name != "ioctl" or arguments[1] not in _QUESTIONS:
                self._made(name)
            ctypes.set_errno(errno)
            return result

        return watched

    def _made(self, name: str | None) -> None:
        if name is None:
            return
        self._count += 1
        os.write(self._reports, f"{name}\n".encode())
        if self._stop is not None and self._count == self._stop.after:
            if self._stop.act is not None:
                self._stop.act()
            else:
                os.read(self._go, 1)
