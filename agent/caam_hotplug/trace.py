"""A timeline of the agent, for whoever looks for where time goes: `run --trace FILE`.

The file is in the Trace Event Format's JSON array, which Perfetto and chrome://tracing show; its
closing bracket is optional, so that a file whose agent was killed can be read as well. Times are
CLOCK_MONOTONIC's, as in the kernel's log. Without --trace nothing is noted, and next to no time is
taken.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final

_NOTHING: Final = nullcontext()
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_WRITTEN_AT_ONCE: Final = 512
_STARTTIME: Final = 19
"""Of the fields that follow the name in /proc/self/stat (proc_pid_stat(5))."""


class _Timeline:
    """The events of one process, in a file. Synchronization: any thread.

    They are written some at a time, since to write one takes as long as what is measured.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._unwritten: list[dict[str, Any]] = []
        file.write("[")

    def note(self, phase: str, name: str, at: float, **more: Any) -> None:
        """An event is in the file, or will be soon; `at` in seconds."""
        thread = threading.get_native_id()
        self._unwritten.append({"ph": phase, "name": name, "ts": at, "tid": thread, **more})
        if thread not in self._threads:
            self._threads.add(thread)
            named = {"name": threading.current_thread().name}
            self._unwritten.append(
                {"ph": "M", "name": "thread_name", "ts": at, "tid": thread, "args": named}
            )
        if len(self._unwritten) >= _WRITTEN_AT_ONCE:
            self.write()

    def write(self) -> None:
        """All that was noted is in the file."""
        import json  # noqa: PLC0415  only needed here

        with self._lock:
            count, pid = len(self._unwritten), os.getpid()
            for event in self._unwritten[:count]:
                event.update(pid=pid, ts=event["ts"] * 1e6)
                self._file.write(f"\n{json.dumps(event)},")
            del self._unwritten[:count]
            self._file.flush()

    def close(self) -> None:
        self.write()
        self._file.write("\n{}]\n")
        self._file.close()


_running: list[_Timeline] = []


@contextmanager
def written_to(path: Path) -> Iterator[None]:
    """What happens meanwhile is in a new file, which nobody else can read.

    Raises: OSError, such as FileExistsError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        timeline = _Timeline(file)
        _running.append(timeline)
        started = _started()
        timeline.note("X", "start Python", started, dur=(time.monotonic() - started) * 1e6)
        imports = _Imports()
        sys.meta_path.insert(0, imports)
        try:
            yield
        finally:
            sys.meta_path.remove(imports)
            _running.remove(timeline)
            timeline.close()


def _started() -> float:
    """When this process was, on the monotonic clock, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot = int(fields[_STARTTIME]) / _CLOCK_TICKS
    return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


def span(name: str, **about: Any) -> AbstractContextManager[None]:
    """While the context lasts, the calling thread does this."""
    return _span(name, about) if _running else _NOTHING


def step(name: str, of: object) -> AbstractContextManager[None]:
    """While the context lasts, this is waited for, by somebody who has a line of his own."""
    return _step(name, str(of)) if _running else _NOTHING


def mark(name: str, **about: Any) -> None:
    """This has happened right now."""
    for timeline in _running:
        timeline.note("i", name, time.monotonic(), s="p", args=about)


@contextmanager
def _span(name: str, about: dict[str, Any]) -> Iterator[None]:
    begun = time.monotonic()
    try:
        yield
    finally:
        for timeline in _running:
            timeline.note("X", name, begun, dur=(time.monotonic() - begun) * 1e6, args=about)


@contextmanager
def _step(name: str, of: str) -> Iterator[None]:
    common = {"cat": "step", "id": of}
    for timeline in _running:
        timeline.note("b", name, time.monotonic(), **common)
    try:
        yield
    finally:
        for timeline in _running:
            timeline.note("e", name, time.monotonic(), **common)


class _Imports:
    """A finder that finds what Python's own does, and notes how long each module takes."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As importlib.abc.MetaPathFinder has it."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def noted(module: ModuleType) -> None:
                with span(f"import {name}"):
                    load(module)

            spec.loader.exec_module = noted  # type: ignore[method-assign]
        return spec
