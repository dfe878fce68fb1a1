"""The whole agent in a process forked from the tests', which spares it a slow start in the guest.

What it does to the kernel can be watched call by call, and stopped at each: the process is killed
there, or held until the test lets it go. None of that is in the product: its bindings are wrapped
in the child before it starts.
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
_TASKS: Final = {0: "dm create", 1: "dm load", 2: "dm remove", 5: "dm resume", 17: "dm message"}


@dataclass(frozen=True, slots=True)
class Stop:
    """What the agent's process does when it has made so many calls since it was ready."""

    after: int
    act: Callable[[], None] | None = None
    """Done by the thread that made the call; None holds it there until `Agent.go_on`."""


def kill_self() -> None:
    """As `kill -9` does it: nothing of the process happens afterwards."""
    os.kill(os.getpid(), signal.SIGKILL)


class Agent:
    """A process that runs the agent; of its end the test is told, and its log is read."""

    def __init__(self, load: Callable[[], Config], notify: Path) -> None:
        """`load` reads its configuration; `notify` is its service manager's socket to be."""
        self._load = load
        self._manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._manager.bind(str(notify))
        self._manager.settimeout(DEADLINE_S)
        self._pid = 0
        self._log = self._told = self._go = -1
        self._unread = b""
        self.said: list[str] = []
        """What it logged since the last start, a line each."""
        self._looked_at = 0
        self._calls = b""

    def start(self, stop: Stop | None = None) -> None:
        """It runs and is ready. What it has said before counts: it may have adopted by then."""
        self.begin(stop)
        self.until_said("^ready: ")
        self._looked_at = 0

    def begin(self, stop: Stop | None = None) -> None:
        """It runs, and adopts what there is; it may not be ready yet."""
        self._end_of_pipes()
        self._log, log = os.pipe()
        self._told, told = os.pipe()
        go, self._go = os.pipe()
        self.said, self._unread, self._looked_at, self._calls = [], b"", 0, b""
        gc.freeze()  # the child's collector leaves alone what is shared with the tests' process
        self._pid = os.fork()
        if self._pid == 0:
            os.environ["NOTIFY_SOCKET"] = self._manager.getsockname()
            os.environ["WATCHDOG_USEC"] = "1000000"
            _be_the_agent(self._load, log, Watch(told, go, stop))
        for end in (log, told, go):
            os.close(end)

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._pid

    @property
    def calls(self) -> list[str]:
        """The calls since it was ready that changed something, in their order."""
        self._note_calls()
        return self._calls.decode().splitlines()

    def _note_calls(self) -> None:
        while select.select([self._told], [], [], 0)[0] and (more := os.read(self._told, 65536)):
            self._calls += more

    def until_called(self, count: int) -> None:
        """It has made so many calls. Raises: AssertionError after the deadline."""
        end = time.monotonic() + DEADLINE_S
        while len(self.calls) < count:
            select.select([self._told], [], [], 1)
            assert time.monotonic() < end, f"only {self.calls}; {self.said}"

    def until_fed(self, times: int) -> None:
        """The service manager's watchdog has been fed so often from now on.

        Raises: TimeoutError after the deadline.
        """
        while select.select([self._manager], [], [], 0)[0]:
            self._manager.recv(4096)
        while times:
            times -= self._manager.recv(4096) == b"WATCHDOG=1"

    def go_on(self) -> None:
        """It is held no more."""
        os.write(self._go, b"g")

    def until_said(self, pattern: str) -> str:
        """The first line that it says after those already looked at and that matches.

        Raises: AssertionError after the deadline, or when it has ended before.
        """
        end = time.monotonic() + DEADLINE_S
        while True:
            for index in range(self._looked_at, len(self.said)):
                if re.search(pattern, self.said[index]):
                    self._looked_at = index + 1
                    return self.said[index]
            assert self._read(end), f"not said: {pattern}\n" + "\n".join(self.said)

    def until_said_ever(self, pattern: str) -> str:
        """The first matching line since its start. Raises: AssertionError after the deadline."""
        self._looked_at = 0
        return self.until_said(pattern)

    def forget(self) -> None:
        """What it has said so far does not count any more.

        The calls that it told of are read as well: it would wait for a reader of a full pipe.
        """
        self._note_calls()
        while self._read(time.monotonic()):
            pass
        self._looked_at = len(self.said)

    def _read(self, end: float) -> bool:
        """Some more of its log; False if none comes."""
        if not select.select([self._log], [], [], max(0, end - time.monotonic()))[0]:
            return False
        more = os.read(self._log, 65536)
        *lines, self._unread = (self._unread + more).split(b"\n")
        self.said += [line.decode().split(">", 1)[1] for line in lines]
        return bool(more)

    def until_killed(self) -> None:
        """It was killed where it was to be. Raises: AssertionError after the deadline."""
        status = self._status()
        assert os.WIFSIGNALED(status), self.everything()
        assert os.WTERMSIG(status) == signal.SIGKILL, self.everything()

    def kill(self) -> None:
        """It is dead, without a chance to do anything."""
        os.kill(self._pid, signal.SIGKILL)
        self.until_killed()

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """The process does not run meanwhile, and reads no event."""
        os.kill(self._pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self._pid, signal.SIGCONT)

    def tell_to_stop(self) -> None:
        """It has been told to stop."""
        os.kill(self._pid, signal.SIGTERM)

    def tell_to_reload(self) -> None:
        """It has been told to read its configuration anew."""
        os.kill(self._pid, signal.SIGHUP)

    def stop(self) -> None:
        """It has stopped in order."""
        self.tell_to_stop()
        self.until_ended()

    def until_ended(self, status: int = 0) -> None:
        """It has ended with this exit status. Raises: AssertionError after the deadline."""
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
        """All that it has said."""
        self.forget()
        return "\n".join(self.said)

    def close(self) -> None:
        """Nothing of the process is left, however it ended."""
        if self._pid:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
            self._pid = 0
        self._end_of_pipes()
        self._manager.close()

    def _end_of_pipes(self) -> None:
        for end in (self._log, self._told, self._go):
            if end >= 0:
                os.close(end)
        self._log = self._told = self._go = -1


def _be_the_agent(load: Callable[[], Config], log: int, watch: Watch) -> None:
    """Never returns: what a test's process has to do at its end is not this one's to do."""
    code = 1
    try:
        os.dup2(log, 2)
        sys.settrace(None)  # the coverage of a process that is killed is not written anyway
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
    """Tells of each call that changes something, once the agent is ready, and stops it there."""

    def __init__(
        self,
        told: int,
        go: int,
        stop: Stop | None,
        functions: frozenset[str] = _FUNCTIONS,
        methods: Sequence[tuple[Any, str]] = _METHODS,
    ) -> None:
        """`functions`: those of C that change something; `methods`: those of Python's modules."""
        self._functions = functions
        self._methods = methods
        self._told = told
        self._go = go
        self._stop = stop
        self._kinds: dict[int, int] = {}
        self._count = 0

    def install(self) -> None:
        """From now on the process's calls are watched."""
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
            self._made(name)
            ctypes.set_errno(errno)
            return result

        return watched

    def _made(self, name: str | None) -> None:
        if name is None:
            return
        self._count += 1
        os.write(self._told, f"{name}\n".encode())
        if self._stop is not None and self._count == self._stop.after:
            if self._stop.act is not None:
                self._stop.act()
            else:
                os.read(self._go, 1)
