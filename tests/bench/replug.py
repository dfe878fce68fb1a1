#!/usr/bin/env python3
"""Measures how soon this board serves a medium that is plugged, and lets go of a pulled one.

A medium that the agent has mounted goes and comes back, again and again: by software, or by your
hand. Before each time all that was written is flushed, and whoever uses the medium is in the way.
Nothing is written to it but what mounting writes; whatever happens, it is put back at the end.
docs/performance-on-a-board.md says how to read the table, and what to send.

It needs root, the running agent, and the caam_hotplug package of its own version.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import math
import os
import platform
import select
import signal
import stat
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

PROGRAM: Final = "replug.py"
_HOMES: Final = (
    Path(__file__).resolve().parent.parent.parent / "agent",
    Path("/usr/lib/caam-hotplug"),
    Path("/usr/local/lib/caam-hotplug"),
)
"""Where the package is if Python does not find it: the agent has a folder of its own."""
if importlib.util.find_spec("caam_hotplug") is None:
    found = next((home for home in _HOMES if (home / "caam_hotplug").is_dir()), None)
    sys.path[:0] = [str(found), str(found / "bundled")] if found else []

try:
    import sdbus

    from caam_hotplug import names
    from caam_hotplug.config import loader
    from caam_hotplug.dbus import client, connection
    from caam_hotplug.dbus.volume_view import ShownVolume
    from caam_hotplug.errors import HotplugError, KernelError, shown
    from caam_hotplug.kernel import (
        config_files,
        device_users,
        mount,
        mountinfo,
        open_files,
        sysfs,
        uevents,
    )
    from caam_hotplug.model import SECTOR_BYTES, Bus, DeviceNumber, Volume
except ImportError as error:
    sys.exit(
        f"{PROGRAM}: import caam_hotplug: {error}; install caam-hotplug of this script's version, "
        "with sdbus, or run it with PYTHONPATH=CHECKOUT/agent"
    )

BLOCKS: Final = Path("/sys/class/block")
QUEUE: Final = Path("/run/udev/queue")
"""There while udevd has events to handle (udev_queue_get_queue_is_empty in libudev)."""
HAND_WITHIN_S: Final = 600
BEGINS_WITHIN_S: Final = 60
ENDS_WITHIN_S: Final = 30
"""After its first event; a second is long."""
LOOKED_FOR_EVERY_S: Final = 0.001
SYSTEMD: Final = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", client.PROPERTIES)

GONE: Final = ("unmounted", "mapping gone", "key gone", "mount point gone")
SPANS: Final = (
    ("plugged", "kernel add"),
    ("kernel add", "udev add"),
    ("kernel add", "mounted"),
    ("udev add", "mounted"),
    *(("removed", end) for end in (*GONE, "nothing left")),
)
"""From one moment to another."""

EXAMPLES: Final = """\
examples:
  sudo python3 replug.py /dev/sda1                      some seconds; the table
  sudo python3 replug.py cartridge-01 --json board.json the same, and a file to send
  sudo python3 replug.py /dev/sda1 --by-hand --cycles 5 you pull and plug when it says so

exit status: 0 it was measured; 1 it could not be; 2 wrong usage; 130 interrupted
"""


class ReplugError(HotplugError):
    """It cannot be measured; operation, subject, cause and what to do are in the words."""


def main() -> int:
    """The table is on standard output, or none of it. Returns: the exit status."""
    given = _arguments()
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under nohup
            signal.signal(number, _ended)
    try:
        report = measured(given.which, given.cycles, given.by_hand, given.json)
        print(table(report))
        if given.json:
            given.json.write_text(json.dumps(report, indent=2) + "\n")
    except (HotplugError, OSError) as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


def _ended(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "which", metavar="LABEL|DEVICE", help="a medium that is mounted, as `status` shows it"
    )
    parser.add_argument(
        "--cycles", type=_count, default=12, metavar="N", help="how often it goes and comes (12)"
    )
    parser.add_argument("--by-hand", action="store_true", help="ask a person to pull and plug")
    parser.add_argument(
        "--json", type=lambda text: Path(text).absolute(), metavar="FILE",
        help="write all that was measured to this file, for programs and to send to others",
    )  # fmt: skip
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def measured(which: str, cycles: int, by_hand: bool, file: Path | None) -> dict[str, Any]:
    """The medium is where it was, and this was measured. Raises: HotplugError; OSError."""
    if os.geteuid() != 0:
        raise ReplugError(f"pull {shown(which)}: only root may do what this does; use sudo")
    agent = asked(which)
    if agent.volume.state != "mounted":
        raise ReplugError(
            f"measure {agent.volume.called}: it is not mounted, but {agent.volume.said}; "
            f"`{names.PROGRAM} explain {shown(agent.volume.device)}` says more"
        )
    medium = Medium.there(Path(agent.volume.device).name, agent.volume.mount_point)
    if file is not None and file.parent.stat().st_dev == os.stat(medium.point).st_dev:
        raise ReplugError(f"write {shown(file)}: it is on the medium itself; choose another place")
    socket = socket_of((BLOCKS / medium.disk).resolve(), medium.volume.bus)
    if socket is None and not by_hand:
        raise ReplugError(
            f"pull {medium.volume.node}: software cannot pull what is attached by "
            f"{medium.volume.bus.value} here; run it with --by-hand"
        )
    report = _about(agent, medium, socket) | {"cycles": cycles, "by_hand": by_hand}
    os.chdir("/")  # where we are may be on the medium
    gc.disable()  # it would be part of what is measured
    samples: list[dict[str, float]] = []
    watch = Watch()
    with _port(None if by_hand else socket) as port:
        for number in range(1, cycles + 1):
            print(f"cycle {number} of {cycles}", file=sys.stderr, flush=True)
            medium, sample = cycle(agent, medium, watch, port)
            samples.append(sample)
    return report | {"figures": figures(samples), "samples": samples}


# -- who serves it, and what it is -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Agent:
    """The running agent, and what it says of the medium."""

    pid: int
    version: str
    systemd: str | None
    volume: ShownVolume

    @property
    def cpu_s(self) -> float:
        """Processor time of all its threads so far.

        Source: clock_getcpuclockid(3); CPUCLOCK_SCHED in linux/posix-timers.h.
        """
        return time.clock_gettime(~self.pid << 3 | 2)

    def memory_mb(self) -> dict[str, float]:
        """By the names that proc(5) has in smaps_rollup."""
        _, *lines = Path(f"/proc/{self.pid}/smaps_rollup").read_text().splitlines()
        parts = (line.partition(":") for line in lines)
        return {name: int(value.split()[0]) * 1024 / 1e6 for name, _, value in parts}


def asked(which: str) -> Agent:
    """What the agent says. Raises: HotplugError if it does not run, or knows no such medium."""
    answers = []

    async def ask(agent: client.Remote) -> None:
        call = agent.connection.call
        volume = await agent.again(await agent.volume(which))
        pid = await call(connection.BUS, "GetConnectionUnixProcessID", "s", names.BUS_NAME)
        try:
            _, systemd = await call(SYSTEMD, "Get", "ss", f"{SYSTEMD[0]}.Manager", "Version")
        except sdbus.SdBusBaseError:  # another init
            systemd = None
        answers.append(Agent(pid, (await agent.manager())["Version"], systemd, volume))

    client.run("measure", ask)
    return answers[0]


@dataclass(frozen=True, slots=True)
class Medium:
    """The medium as it is there now; each time it comes it is another one to the kernel."""

    volume: Volume
    disk: str
    mapping: str
    """Such as dm-0."""
    point: str

    @classmethod
    def there(cls, name: str, point: str) -> Medium:
        """The medium at the kernel's name, mounted at the point. Raises: ReplugError; OSError."""
        volume = sysfs.volume_at(name, {}, "kernel")
        above = os.listdir(BLOCKS / name / "holders") if volume else []
        if volume is None or len(above) != 1:
            raise ReplugError(f"look at {shown(name)}: it has gone; plug it in and try again")
        disk = sysfs.disk_name(name) if volume.id.partition else name
        return cls(volume, disk, above[0], point)

    def gone(self) -> dict[str, Callable[[], bool]]:
        """Whether each part of it has gone. Some are announced by nothing, or before their end."""
        key = names.key_description(self.volume.id)
        return {
            "unmounted": lambda: not is_mounted(self.point),
            "mapping gone": lambda: not (BLOCKS / self.mapping).exists(),
            "key gone": lambda: not has_key(Path("/proc/keys").read_text(errors="replace"), key),
            "mount point gone": lambda: not is_mounted(self.point) and not _is_ours(self.point),
        }

    def require_unused(self, socket: Socket | None) -> None:
        """Nobody uses it, nor what would go with it. Raises: ReplugError; DeviceInUseError."""
        mapping = BLOCKS / self.mapping
        number = DeviceNumber.from_text((mapping / "dev").read_text())
        users = [str(one) for one in open_files.search(number, _text(mapping / "dm/name") or "")]
        mounts, below = mountinfo.mounts(), f"{self.point}/"
        sources = {mount.source for mount in mounts if mount.point == self.point}
        users += [
            f"there is a mount at {shown(mount.point)}"
            for mount in mounts
            if mount.point.startswith(below)
            or (mount.source in sources and mount.point != self.point)
        ]
        backing = BLOCKS.glob("loop*/loop/backing_file")
        inside = [file for file in backing if (_text(file) or "").startswith(below)]
        users += [f"{file.parts[-3]} lies on it" for file in inside]
        for other in sysfs.there():
            if other.id.diskseq == self.volume.id.diskseq:
                if other.id.partition not in {0, self.volume.id.partition}:
                    device_users.require_unused(other)
            elif socket and (BLOCKS / other.name).resolve().is_relative_to(socket.folder):
                users.append(f"{other.node} would go as well")
        if users:
            raise ReplugError(
                f"pull {self.volume.node}: it is in use: {'; '.join(users)}; end that first"
            )


def is_mounted(point: str) -> bool:
    """Whether anything is mounted there."""
    return any(mount.point == point for mount in mountinfo.mounts())


def _is_ours(point: str) -> bool:
    """Whether the directory is one that the agent makes and removes; others stay."""
    try:
        return stat.S_IMODE(os.stat(point).st_mode) == names.MOUNT_POINT_MODE
    except FileNotFoundError:
        return False


def has_key(listed: str, description: str) -> bool:
    """Whether /proc/keys has it; one that nobody uses awaits its collector (security/keys/gc.c)."""
    lines = (line.split(None, 8) for line in listed.splitlines())
    return any(of[2] != "0" and of[8].startswith(f"{description}: ") for of in lines)


# -- how it goes and comes -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Socket:
    """Where a medium sits; what is written where, so that it goes, and comes back."""

    folder: Path
    """In sysfs. All of the medium is below it, each time it comes."""
    away: tuple[Path, str]
    back: tuple[Path, str]


def socket_of(disk: Path, bus: Bus) -> Socket | None:
    """That of the disk at this folder of sysfs; None if software cannot pull it.

    Source: `authorized` in Documentation/ABI/testing/sysfs-bus-usb; `delete` and `scan` in
    drivers/scsi/scsi_sysfs.c; `unbind` and `bind` in Documentation/driver-api/driver-model.
    """
    for above in disk.parents:
        driver = (above / "driver").resolve()
        match bus:
            case Bus.USB if (above / "busnum").exists():
                switch = above / "authorized"
                return Socket(above, (switch, "0"), (switch, "1"))
            case Bus.SCSI | Bus.ATA if (above / "delete").exists():
                host, _, place = above.name.partition(":")
                (at,) = (up for up in above.parents if up.name == f"host{host}")
                scan = at / "scsi_host" / at.name / "scan"
                return Socket(above, (above / "delete", "1"), (scan, place.replace(":", " ")))
            case Bus.MMC if (above / "mmc_host").exists() and (driver / "unbind").exists():
                name = above.name
                return Socket(above, (driver / "unbind", name), (driver / "bind", name))
    return None


class Port:
    """The medium goes and comes, by software or by somebody's hand."""

    def __init__(self, socket: Socket | None) -> None:
        self.socket = socket
        self.is_out = False
        self.thread = ThreadPoolExecutor(1)
        """The kernel takes its time over it, and tells meanwhile."""

    def away(self) -> None:
        """The medium is gone, or somebody was asked to pull it. Raises: KernelError."""
        self.is_out = True
        try:
            self._do(self.socket.away if self.socket else None, "pull the medium now")
        except KernelError:
            self.is_out = False
            raise

    def back(self) -> None:
        """The medium is back, or somebody was asked to plug it. Raises: KernelError."""
        self._do(self.socket.back if self.socket else None, "plug the medium in again")
        self.is_out = False

    def _do(self, what: tuple[Path, str] | None, words: str) -> None:
        if what is None:
            print(words, file=sys.stderr, flush=True)
            return
        file, text = what
        try:
            file.write_text(text)
        except OSError as error:
            hint = "if it is away, pull it and plug it in again"
            raise KernelError(f"write {text!r} to", str(file), error.errno or 0, hint) from error


@contextmanager
def _port(socket: Socket | None) -> Iterator[Port]:
    """By it the medium goes and comes; on the way out it is put back, whatever happened."""
    port = Port(socket)
    try:
        yield port
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        port.thread.shutdown()  # what has begun has ended
        if port.is_out:
            port.back()


# -- measuring -------------------------------------------------------------------------------------


class Watch:
    """Sees one medium go and come, on the monotonic clock."""

    def __init__(self) -> None:
        self.name = ""
        """The kernel's name of what came or went last."""
        groups = {"kernel": uevents.KERNEL_GROUP, "udev": uevents.UDEV_GROUP}
        self._events = {source: uevents.Uevents(group) for source, group in groups.items()}
        self._mounts = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  until the end
        self._poll = select.poll()
        for listener in self._events.values():
            self._poll.register(listener, select.POLLIN)
        self._poll.register(self._mounts, select.POLLPRI | select.POLLERR)

    def seen(
        self,
        port: Port,
        act: Callable[[], None],
        is_mine: Callable[[uevents.Uevent], bool],
        events: Sequence[str],
        looks: Mapping[str, Callable[[], bool]],
        every_s: float,
    ) -> dict[str, float]:
        """When it was begun, told of by each event, and each look found it so.

        `every_s`: how often to look, if no event or mount comes. Raises: ReplugError; KernelError.
        """
        list(self._told(0, is_mine))
        moments = {"begun": time.monotonic()}
        acting = port.thread.submit(act)
        first, awaited = events[0], {*events, *looks}
        patience_s = BEGINS_WITHIN_S if port.socket else HAND_WITHIN_S
        while missing := sorted(awaited - moments.keys()):
            if acting.done():
                acting.result()
            if time.monotonic() > moments.get(first, moments["begun"] + patience_s) + ENDS_WITHIN_S:
                raise ReplugError(
                    f"wait for {', '.join(missing)}: not so within the time for it; "
                    f"journalctl -u {names.PROGRAM} may say why"
                )
            for moment in self._told(every_s if first in moments else 1, is_mine):
                moments.setdefault(moment, time.monotonic())
            if first in moments:
                for name in looks.keys() - moments.keys():
                    if looks[name]():
                        moments[name] = time.monotonic()
        acting.result()
        return moments

    def _told(self, within_s: float, is_mine: Callable[[uevents.Uevent], bool]) -> Iterator[str]:
        self._poll.poll(within_s * 1000)
        for source, listener in self._events.items():
            for event in listener.read(1000):
                if event is not None and is_mine(event):
                    self.name = event.name
                    yield f"{source} {event.action}"


def cycle(
    agent: Agent, medium: Medium, watch: Watch, port: Port
) -> tuple[Medium, dict[str, float]]:
    """The medium has gone and come. Returns: it as it is there now, and what was measured.

    Raises: HotplugError; OSError.
    """
    medium.require_unused(port.socket)
    mount.flush(medium.point, f"/dev/{medium.mapping}")
    cpu_s, before = agent.cpu_s, medium.volume
    partition = str(before.id.partition)
    folder = port.socket.folder if port.socket else Path("/sys/devices")

    def comes(event: uevents.Uevent) -> bool:
        place = Path(f"/sys{event.properties.get('DEVPATH', '')}")
        return event.properties.get("PARTN", "0") == partition and folder in place.parents

    there = {part: has_gone for part, has_gone in medium.gone().items() if not has_gone()}
    down = watch.seen(
        port, port.away, lambda event: event.name == before.name, ["kernel remove"], there,
        LOOKED_FOR_EVERY_S,
    )  # fmt: skip
    down = dict.fromkeys(GONE, down["kernel remove"]) | down  # what had gone before took no time
    settle()
    told = ["kernel add", "udev add"] if names.UDEV_CONTROL.exists() else ["kernel add"]
    mounted = {"mounted": lambda: is_mounted(medium.point)}
    up = watch.seen(port, port.back, comes, told, mounted, 1)
    settle()
    cpu_s = agent.cpu_s - cpu_s
    now = asked(f"/dev/{watch.name}")
    if now.pid != agent.pid:
        raise ReplugError("measure the agent: it was started anew meanwhile; try again")
    moments = up | down | {"nothing left": max(down[part] for part in GONE)}
    moments["removed"] = down["kernel remove"]
    if port.socket is not None:
        moments["plugged"] = up["begun"]
    sample = spans(moments) | {"agent's CPU, ms": cpu_s * 1000}
    sample |= {f"agent's {name.upper()}, MB": agent.memory_mb()[name] for name in ("Rss", "Pss")}
    sample |= {f"  {step}, ms": took * 1000 for step, took in now.volume.steps_s.items()}
    rounded = {title: round(value, 3) for title, value in sample.items()}
    return Medium.there(watch.name, medium.point), rounded


def spans(moments: Mapping[str, float]) -> dict[str, float]:
    """The times between them, and udev's share; none from or to what there was not."""
    found = {
        f"{begin} -> {end}, ms": (moments[end] - moments[begin]) * 1000
        for begin, end in SPANS
        if {begin, end} <= moments.keys()
    }
    if "udev add" in moments:
        share = found["kernel add -> udev add, ms"] / found["kernel add -> mounted, ms"]
        found["udev's share of kernel add -> mounted"] = share
    return found


def settle() -> None:
    """udevd has nothing more to do. Raises: ReplugError."""
    end = time.monotonic() + ENDS_WITHIN_S
    while QUEUE.exists():
        if time.monotonic() > end:
            raise ReplugError(f"wait for udevd: busy after {ENDS_WITHIN_S} s; udevadm monitor")
        time.sleep(0.02)


# -- telling ---------------------------------------------------------------------------------------


def _about(agent: Agent, medium: Medium, socket: Socket | None) -> dict[str, Any]:
    """The machine, the programs and the medium; nothing that tells one of a kind from another."""
    try:
        configured = loader.load(names.CONFIG_FILE, config_files.AnyonesFiles(), required=False)
    except HotplugError:
        configured = None
    volume = medium.volume
    what = " ".join(filter(None, (volume.vendor, volume.model)))
    speed = _text(socket.folder / "speed") if socket and volume.bus is Bus.USB else None
    soc = (_text(Path("/sys/devices/soc0") / name) for name in ("family", "soc_id", "revision"))
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": _text(Path("/proc/device-tree/model")),
        "soc": " ".join(filter(None, soc)) or None,
        "architecture": os.uname().machine,
        "kernel": os.uname().release,
        "cpus": os.cpu_count(),
        "governor": _text(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")),
        "caam_hotplug": agent.version,
        "python": platform.python_version(),
        "systemd": agent.systemd,
        "await_udev": configured.await_udev if configured else None,
        "bus": volume.bus.value,
        "usb_mbit_s": speed,
        "model": what or None,
        "size_mb": round(volume.size * SECTOR_BYTES / 1e6),
        "filesystem": agent.volume.filesystem,
    }


def _text(file: Path) -> str | None:
    try:
        return file.read_text(errors="replace").strip("\0\n ")
    except OSError:
        return None


def figures(samples: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Median, 95th percentile (the nearest rank), least and most of each column."""
    titles = dict.fromkeys(title for sample in samples for title in sample)
    columns = {title: sorted(one[title] for one in samples if title in one) for title in titles}
    return {
        title: {
            "median": round(statistics.median(values), 3),
            "p95": values[math.ceil(len(values) * 0.95) - 1],
            "min": values[0],
            "max": values[-1],
        }
        for title, values in columns.items()
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people; what is not known is left out."""
    of = {name: str(value) for name, value in report.items() if value is not None}
    words = (
        (
            "{date}", "{machine}", "{soc}", "{architecture}", "Linux {kernel}", "{cpus} CPUs",
            "governor {governor}",
        ),
        ("caam-hotplug {caam_hotplug}", "Python {python}", "systemd {systemd}", "{waits}"),
        ("{bus}", "{usb_mbit_s} Mbit/s", "{model}", "{size_mb} MB", "{filesystem}", "{how}"),
    )  # fmt: skip
    of["waits"] = f"await_udev {of.get('await_udev', 'unknown')}".lower()
    of["how"] = f"{of['cycles']} cycles by {'hand' if report['by_hand'] else 'software'}"
    lines = [", ".join(_filled(line, of)) for line in words]
    heads = ("median", "p95", "min", "max")
    lines += ["", f"{'':<40}" + "".join(f"{head:>10}" for head in heads)]
    for title, one in report["figures"].items():
        lines.append(f"{title:<40}" + "".join(f"{_shown(one[head]):>10}" for head in heads))
    return "\n".join(lines)


def _filled(words: Sequence[str], of: Mapping[str, str]) -> Iterator[str]:
    for text in words:
        with suppress(KeyError):
            yield text.format_map(of)


def _shown(value: float) -> str:
    places = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
