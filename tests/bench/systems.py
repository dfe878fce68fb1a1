"""The systems that are measured: each runs in a slice of systemd's, alone.

All serve the same medium in the same place. `PROGRAMS` has what they run; `vm/bench.py` puts the
program L there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from kernel.witness import run

LABEL: Final = "cartridge-01"
BLOB: Final = Path("/data/caam/cartridge-01.bb")
POINT: Final = Path("/run/media/cartridge-01")
PROGRAMS: Final = Path("/var/tmp/bench")
SLICE: Final = "bench.slice"
CGROUP: Final = Path("/sys/fs/cgroup") / SLICE
AGENT: Final = "caam-hotplug.service"
UNITS: Final = Path("/run/systemd/system")
HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve the medium."""

    what: str
    unit: str
    """Started with it and stopped."""
    files: dict[str, str]
    """Of systemd's, by their names."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """It is there and serves the medium; nothing of it is there afterwards."""
        with ExitStack() as held:
            held.callback(run, "systemctl", "daemon-reload")
            for name, text in self.files.items():
                held.callback(_remove, UNITS / name)
                (UNITS / name).parent.mkdir(exist_ok=True)
                (UNITS / name).write_text(text)
            run("systemctl", "daemon-reload")
            held.callback(run, "systemctl", "stop", self.unit)
            run("systemctl", "start", self.unit)
            yield


def _remove(file: Path) -> None:
    file.unlink()
    if file.parent.suffix == ".d":
        file.parent.rmdir()


def _unit(command: str) -> str:
    return f"[Service]\nType=notify\nSlice={SLICE}\nKeyringMode=private\n{command}\n"


SYSTEMS: Final = {
    "L": System(
        "a C program that spawns nothing: the limit",
        "bench-limit.service",
        files={
            "bench-limit.service": _unit(f"ExecStart={PROGRAMS}/limit {LABEL} {BLOB} {POINT}"),
        },
    ),
    "agent": System(
        "caam-hotplug, the installed service",
        AGENT,
        files={f"{AGENT}.d/bench.conf": f"[Service]\nSlice={SLICE}\n"},
    ),
    "P": System(
        "a naive loop over pyudev that runs the board's tools",
        "bench-naive.service",
        files={
            "bench-naive.service": _unit(
                f"ExecStart=/usr/bin/python3 {HERE}/naive.py {LABEL} {POINT}"
            ),
        },
    ),
}
"""By the names that the options and the table have for them."""


def cpu_s(cgroup: Path) -> float:
    """Processor time that all that ever ran in the control group has used."""
    lines = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
    return int(lines["usage_usec"]) / 1e6


def memory_kib() -> dict[str, int]:
    """RSS and PSS of the processes that run in the slice, added up; 0 if none does."""
    found = {"Rss": 0, "Pss": 0}
    for listed in CGROUP.glob("**/cgroup.procs"):
        for pid in listed.read_text().split():
            for line in _memory_map(pid):
                name, _, value = line.partition(":")
                if name in found:
                    found[name] += int(value.split()[0])
    return found


def _memory_map(pid: str) -> list[str]:
    try:
        return Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has ended since it was listed
        return []
