"""A timeline of the agent, to see where time goes: `run --trace FILE`.

The file is in the Trace Event Format's JSON array, which Perfetto and chrome://tracing show. Its
closing bracket is optional, so the file of an agent that was killed can be read too. Times are
CLOCK_MONOTONIC's, as in the kernel's log. The agent itself knows only `volume.worker.Observe`;
nothing but the command line imports this module.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import IO, Any, Final

_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_WRITTEN_AT_ONCE: Final = 512
_STARTTIME: Final = 19
"""Of the fields that follow the name in /proc/self/stat (proc_pid_stat(5))."""


class Timeline:
    """The events of one process, in a file. Synchronization: any thread.

    They are written several at a time, since writing one takes as long as what is measured.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._threads: set[int] = set()
        self._unwritten: list[dict[str, Any]] = []
        file.write("[")

    @contextmanager
    def observe(self, words: str, waiting: str = "") -> Iterator[None]:
        """Note what begins and ends: in the calling thread, or what the loop waits for.

        What is waited for overlaps, so it has a line of its own for each worker (`waiting`).
        """
        begun = time.monotonic()
        line = {"cat": "waiting", "id": waiting}
        if waiting:
            self.note("b", words, begun, **line)
        try:
            yield
        finally:
            ended = time.monotonic()
            if waiting:
                self.note("e", words, ended, **line)
            else:
                self.note("X", words, begun, dur=(ended - begun) * 1e6)

    def note(self, phase: str, name: str, at: float, **more: Any) -> None:
        """Add an event; `at` in seconds."""
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
        """Write all events to the file."""
        import json  # noqa: PLC0415  only needed here

        with self._lock:
            count, pid = len(self._unwritten), os.getpid()
            for event in self._unwritten[:count]:
                event.update(pid=pid, ts=event["ts"] * 1e6)
                self._file.write(f"\n{json.dumps(event)},")
            del self._unwritten[:count]
            self._file.flush()

    def close(self) -> None:
        """Write all events and the end of the file."""
        self.write()
        self._file.write("\n{}]\n")
        self._file.close()


@contextmanager
def written_to(path: Path) -> Iterator[Timeline]:
    """Write a timeline to a new file, which only its owner can read.

    Raises: OSError, such as FileExistsError.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    with open(os.open(path, flags, 0o600), "w", encoding="utf-8") as file:  # noqa: PTH123
        timeline = Timeline(file)
        started = _started()
        timeline.note("X", "start Python", started, dur=(time.monotonic() - started) * 1e6)
        imports = _Imports(timeline)
        sys.meta_path.insert(0, imports)
        try:
            yield timeline
        finally:
            sys.meta_path.remove(imports)
            timeline.close()


def _started() -> float:
    """When this process was started, on the monotonic clock, to a hundredth of a second."""
    fields = Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    since_boot = int(fields[_STARTTIME]) / _CLOCK_TICKS
    return since_boot - time.clock_gettime(time.CLOCK_BOOTTIME) + time.monotonic()


class _Imports:
    """A finder that finds what Python's own does, and notes how long each module takes."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As importlib.abc.MetaPathFinder has it."""
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def noted(module: ModuleType) -> None:
                with self._timeline.observe(f"import {name}"):
                    load(module)

            spec.loader.exec_module = noted  # type: ignore[method-assign]
        return spec
