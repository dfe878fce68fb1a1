"""The systems that are measured: each runs alone, in a slice of systemd's.

All serve a medium with the same label, on a disk of the same size. `PROGRAMS` has their programs;
`vm/bench.py` puts the program L there.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from kernel.cartridges import KEY
from kernel.witness import run

LABEL: Final = "cartridge-01"
LABELS: Final = "cartridge-*"
BLOBS: Final = Path("/data/caam")
MOUNT_ROOT: Final = Path("/run/media")
PROGRAMS: Final = Path("/var/tmp/bench")
SLICE: Final = "system-bench.slice"
"""A neighbour of the system's other services, as the agent is where it is installed."""
CGROUP: Final = Path("/sys/fs/cgroup/system.slice") / SLICE
AGENT: Final = "caam-hotplug.service"
UNITS: Final = Path("/run/systemd/system")
UDEV_RULE: Final = "/run/udev/rules.d/90-bench.rules"
KEY_FILE: Final = "/run/bench.key"
UDISKIE_CONFIG: Final = "/run/bench-udiskie.yml"
EXTENSION: Final = "udisks"
PACKAGES: Final = ["udisks2", "libblockdev-crypto2", "udiskie"]
"""Packages of the system extension."""
BEFORE: Final = PROGRAMS / "before"
"""Prefix at which another version of the agent is installed."""
HERE: Final = Path(__file__).parent
ROOT: Final = HERE.parents[1]


@dataclass(frozen=True, slots=True)
class System:
    """A system that serves media."""

    what: str
    units: tuple[str, ...] = ()
    """Units to start in this order, and to stop; none if udev's events start it."""
    files: dict[str, str] = field(default_factory=dict)
    """Files by their paths; a relative path is a unit of systemd's."""
    mount_root: Path = MOUNT_ROOT
    """Folder of its mount points."""
    container: bool = False
    """Whether its medium is a LUKS2 container, not the board's format."""
    extension: bool = False
    """Whether its packages are in the guest only as a system extension."""
    stays: tuple[str, ...] = ()
    """Moments in watcher.GONE that never come by the system's design."""

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start the system; stop it and remove everything of it afterwards."""
        with ExitStack() as held:
            held.callback(_reload)
            if self.extension:
                held.callback(run, "systemd-sysext", "unmerge")
                run("systemd-sysext", "merge")
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
        """Return the path where it mounts the medium with this label."""
        return self.mount_root / label


def _reload() -> None:
    """Load units, udev's rules and the bus's from the files, for each system alike."""
    run("systemctl", "daemon-reload")
    run("udevadm", "control", "--reload")
    run("systemctl", "reload", "dbus")


def _remove(file: Path) -> None:
    file.unlink()
    if file.parent.suffix == ".d" and not any(file.parent.iterdir()):
        file.parent.rmdir()


def _unit(command: str) -> str:
    return f"[Service]\nType=notify\nSlice={SLICE}\nKeyringMode=private\nExecStart={command}\n"


# A module that is None cannot be imported: sys.modules in Python's reference.
_WITHOUT_SDBUS: Final = (
    "import sys; sys.modules['sdbus'] = None; __file__ = '/usr/bin/caam-hotplug'; "
    "exec(open(__file__).read())"
)

# ExecStop= is left out if the medium goes before `up` has ended, though it may be mounted by then.
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
ExecStopPost={HERE}/board down %i
"""
_BOARD_RULE: Final = (
    f'ACTION=="add", SUBSYSTEM=="block", ENV{{ID_PART_ENTRY_NAME}}=="{LABELS}", '
    'ENV{SYSTEMD_WANTS}+="bench-board@%k.service"\n'
)

_ESCAPED: Final = LABEL.replace("-", "\\x2d")
_PARTITION: Final = f"dev-disk-by\\x2dpartlabel-{_ESCAPED}.device"
_MOUNT: Final = f"run-media-{_ESCAPED}.mount"
_CRYPTTAB: Final = (
    f"{LABEL} /dev/disk/by-partlabel/{LABEL} {KEY_FILE} "
    "plain,cipher=aes-cbc-plain,size=128,noauto\n"
)
# Stopped in reverse order, it is unmounted first: otherwise the mapping is in use and remains.
_MOUNT_OF_A_MAPPING: Final = f"""\
[Unit]
BindsTo={_PARTITION}
After={_PARTITION} systemd-cryptsetup@{_ESCAPED}.service
[Mount]
What=/dev/mapper/{LABEL}
Where={MOUNT_ROOT}/{LABEL}
Type=ext4
Options=nosuid,nodev,noexec
Slice={SLICE}
"""

_UDISKIE: Final = f"""\
[Unit]
Requires=udisks2.service
After=udisks2.service
[Service]
Slice={SLICE}
ExecStart=/usr/bin/udiskie --no-tray --no-notify --no-file-manager --config {UDISKIE_CONFIG}
"""
# It needs a prompt to unlock, even with a key file; and the extension is on a loop device.
_UDISKIE_CONFIG: Final = f"""\
program_options: {{password_prompt: /bin/false}}
device_config:
- {{is_loop: true, ignore: true}}
- {{is_luks: true, keyfile: {KEY_FILE}}}
"""

_FLOOD: Final = f"{HERE.parent}/bus/flood.py get all introspect objects"
_LOOP: Final = '-c "while True: pass"'


def _crowd(arguments: str) -> dict[str, str]:
    """Return the unit of a Python program that an ordinary user runs several times."""
    settings = "[Service]\nUser=nobody\nSlice=user.slice\n"
    return {"bench-crowd@.service": f"{settings}ExecStart=/usr/bin/python3 {arguments}\n"}


_CROWD: Final = tuple(f"bench-crowd@{number}.service" for number in range(1, 5))
_WEIGHT: Final = re.findall("(?m)^CPUWeight=.*", (ROOT / f"config/{AGENT}").read_text())[0]
_AGENT: Final = {
    f"{AGENT}.d/bench.conf": f"[Service]\nSlice={SLICE}\n",
    # The agent's own weight counts within the slice only, where it is alone.
    f"{SLICE}.d/bench.conf": f"[Slice]\n{_WEIGHT}\n",
}

SYSTEMS: Final = {
    "L": System(
        "a C program that spawns nothing: the limit",
        ("bench-limit.service",),
        {"bench-limit.service": _unit(f"{PROGRAMS}/limit {LABELS} {BLOBS} {MOUNT_ROOT}")},
    ),
    "agent": System(
        "caam-hotplug, the installed service",
        (AGENT,),
        _AGENT,
    ),
    "before": System(
        "another version of caam-hotplug, in the same unit",
        (AGENT,),
        {
            **_AGENT,
            f"{AGENT}.d/bench.conf": (
                f"[Service]\nSlice={SLICE}\nExecStart=\nExecStart={BEFORE}/bin/caam-hotplug run\n"
            ),
        },
    ),
    "nobus": System(
        "caam-hotplug where sdbus is not installed",
        (AGENT,),
        {
            **_AGENT,
            f"{AGENT}.d/bench.conf": (
                f"[Service]\nSlice={SLICE}\nExecStart=\n"
                f'ExecStart=/usr/bin/python3 -I -c "{_WITHOUT_SDBUS}" run\n'
            ),
        },
    ),
    "flood": System(
        "caam-hotplug while four processes of an ordinary user flood it with reads over D-Bus",
        (AGENT, *_CROWD),
        _AGENT | _crowd(_FLOOD),
    ),
    "busy": System(
        "caam-hotplug while four processes of an ordinary user count, and leave it alone",
        (AGENT, *_CROWD),
        _AGENT | _crowd(_LOOP),
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
    "Y": System(
        "crypttab and a mount unit of systemd's; the key lies in a file, in the clear",
        files={
            "/etc/crypttab": _CRYPTTAB,
            KEY_FILE: KEY.decode(),
            "systemd-cryptsetup@.service.d/bench.conf": f"[Service]\nSlice={SLICE}\n",
            f"{_PARTITION}.d/bench.conf": f"[Unit]\nWants={_MOUNT}\n",
            _MOUNT: _MOUNT_OF_A_MAPPING,
        },
        stays=("directory gone",),
    ),
    "U": System(
        "udisks2 and udiskie; LUKS2 with the cheapest pbkdf2, the key in a file, in the clear",
        ("udisks2.service", "bench-udiskie.service"),
        {
            KEY_FILE: KEY.decode(),
            UDISKIE_CONFIG: _UDISKIE_CONFIG,
            "udisks2.service.d/bench.conf": f"[Service]\nSlice={SLICE}\n",
            "bench-udiskie.service": _UDISKIE,
        },
        mount_root=Path("/media/root"),
        container=True,
        extension=True,
    ),
}
"""Systems by their names in options and tables."""


def cpu_s(cgroup: Path) -> float:
    """Return the processor time of everything that ever ran in the control group."""
    lines = dict(line.split() for line in (cgroup / "cpu.stat").read_text().splitlines())
    return int(lines["usage_usec"]) / 1e6


def memory_kib() -> dict[str, int]:
    """Return RSS and PSS of the processes that run in the slice, added up; 0 without any."""
    found = {"Rss": 0, "Pss": 0}
    for folder, _, _ in os.walk(CGROUP):  # os.walk skips what has ended since it was listed
        for pid in _read(f"{folder}/cgroup.procs").split():
            for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
                name, _, value = line.partition(":")
                if name in found:
                    found[name] += int(value.split()[0])
    return found


def _read(path: str) -> str:
    """Return the file's text, or none if its process has ended."""
    try:
        return Path(path).read_text()
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.ESRCH):
            raise
        return ""
