"""The systems that are measured: each runs in a slice of systemd's, alone.

All serve a medium with the same label, on a disk of the same size. `PROGRAMS` has what they run;
`vm/bench.py` puts the program L there.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kernel.witness import run

LABEL: Final = "cartridge-01"
LABELS: Final = "cartridge-*"
BLOBS: Final = Path("/data/caam")
MOUNT_ROOT: Final = Path("/run/media")
PROGRAMS: Final = Path("/var/tmp/bench")
SLICE: Final = "bench.slice"
CGROUP: Final = Path("/sys/fs/cgroup") / SLICE
AGENT: Final = "caam-hotplug.service"
UNITS: Final = Path("/run/systemd/system")
UDEV_RULE: Final = "/run/udev/rules.d/90-bench.rules"
HERE: Final = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class System:
    """A way to serve media."""

    what: str
    units: tuple[str, ...] = ()
    """Started with it, in their order, and stopped; none if udev's events start what it is."""
    files: dict[str, str] = field(default_factory=dict)
    """By their paths; those that are not absolute are systemd's units."""
    stays: tuple[str, ...] = ()
    """Of the moments in watcher.GONE those that never come, since that is how it is made."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """It is there and serves media; nothing of it is there afterwards."""
        with ExitStack() as held:
            held.callback(_reload)
            for name, text in self.files.items():
                file = UNITS / name
                held.callback(_remove, file)
                file.parent.mkdir(exist_ok=True)
                file.write_text(text)
            _reload()
            for unit in self.units:
                held.callback(run, "systemctl", "stop", unit)
                run("systemctl", "start", unit)
            yield

    def point(self, label: str = LABEL) -> Path:
        """Where it mounts the medium of this label."""
        return MOUNT_ROOT / label


def _reload() -> None:
    """Units and udev's rules are as the files say: for each system, whichever of them it has."""
    run("systemctl", "daemon-reload")
    run("udevadm", "control", "--reload")


def _remove(file: Path) -> None:
    file.unlink()
    if file.parent.suffix == ".d" and not any(file.parent.iterdir()):
        file.parent.rmdir()


def _unit(command: str) -> str:
    return f"[Service]\nType=notify\nSlice={SLICE}\nKeyringMode=private\nExecStart={command}\n"


_BOARD: Final = f"""\
[Unit]
BindsTo=dev-%i.device
After=dev-%i.device
CollectMode=inactive-or-failed
[Service]
Type=oneshot
RemainAfterExit=yes
Slice={SLICE}
KeyringMode=private
ExecStart={HERE}/board up %i
ExecStop={HERE}/board down %i
"""
_BOARD_RULE: Final = (
    f'ACTION=="add", SUBSYSTEM=="block", ENV{{ID_PART_ENTRY_NAME}}=="{LABELS}", '
    'ENV{SYSTEMD_WANTS}+="bench-board@%k.service"\n'
)

SYSTEMS: Final = {
    "L": System(
        "a C program that spawns nothing: the limit",
        ("bench-limit.service",),
        {"bench-limit.service": _unit(f"{PROGRAMS}/limit {LABELS} {BLOBS} {MOUNT_ROOT}")},
    ),
    "agent": System(
        "caam-hotplug, the installed service",
        (AGENT,),
        {f"{AGENT}.d/bench.conf": f"[Service]\nSlice={SLICE}\n"},
    ),
    "S": System(
        "the board's procedure as a script, in a unit that a udev rule pulls in",
        files={"bench-board@.service": _BOARD, UDEV_RULE: _BOARD_RULE},
    ),
    "P": System(
        "a naive loop over pyudev that runs the board's tools",
        ("bench-naive.service",),
        {"bench-naive.service": _unit(f"/usr/bin/python3 {HERE}/naive.py {LABELS} {MOUNT_ROOT}")},
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
    for folder, _, _ in os.walk(CGROUP):  # which passes over what has ended since it was listed
        for pid in _read(f"{folder}/cgroup.procs").split():
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
                name, _, value = line.partition(":")
                if name in found:
                    found[name] += int(value.split()[0])
    return found


def _read(path: str) -> str:
    """The file's text, or none if whose it is has ended."""
    try:
        return Path(path).read_text()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ESRCH):
            raise
        return ""
