"""Holders, which keep a filesystem from being unmounted: by files, directories, namespaces.

All is read as text from /proc. No path of another process is opened or followed, since it may lead
to a file system that hangs. Other users' processes can be read with CAP_SYS_PTRACE only.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import select
import signal
import socket
import time
from collections import abc
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Final, TextIO

from caam_hotplug import names
from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import detached_files, mountinfo
from caam_hotplug.kernel.mountinfo import NAMES_ITS_DEVICE
from caam_hotplug.model import DeviceNumber, Holder, Mapping, Mount

log = logging.getLogger(__name__)

_PROC: Final = Path("/proc")
_CAP_SYS_PTRACE: Final = 1 << 19
_ANSWERS_WITHIN_S: Final = 30.0
"""A program starts to answer, on a slow processor."""
_USES_REPORTED: Final = 8
"""Uses reported of one process."""
_USE_LENGTH: Final = 300
_END: Final = Holder(0, "", "")
"""Follows the last holder in an answer, which else was cut short."""
_LINKS: Final = {
    "cwd": "works in {}",
    "root": "has {} as its root",
    "exe": "runs {}",
}


def find(mapping: Mapping, also: DeviceNumber | None = None) -> list[Holder]:
    """Return the holders of the mapping's filesystem.

    `also`: the number that the filesystem's files have, if that is its own, as with btrfs. After a
    lazy unmount nothing else tells whose they are.

    A service that may see into other processes answers; without it, the result is what this process
    may see. Blocks for as long as the answer takes.
    """
    devices = {} if also is None else {also: mapping.node}
    return openers({**devices, mapping.number: mapping.name})


def openers(devices: abc.Mapping[DeviceNumber, str], *, of_all: bool = False) -> list[Holder]:
    """As `find`, for several devices: the name of each mapping, or the node of another device.

    `of_all`: whether none means that no process has it open.
    Raises: UnknownError, also for want of descriptors: a search would miss what it cannot open.
    """
    try:
        found = _asked(devices)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EIO
        is_short = number in {errno.EMFILE, errno.ENFILE}
        if is_short or (of_all and not _sees_others()):
            detail = "" if is_short else f"nobody answers at {names.HOLDERS_SOCKET}"
            what = ", ".join(devices.values())
            raise UnknownError("look who has open", what, number, detail) from error
        log.debug("nobody answers at %s: %s", names.HOLDERS_SOCKET, error)
        found = search(devices)
    return [holder for holder in found if holder.pid != os.getpid()]


def _sees_others() -> bool:
    """Return whether this process may see into all others. Source: proc_pid_status(5)."""
    lines = (_PROC / "self" / "status").read_text(errors="replace").splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) & _CAP_SYS_PTRACE)


def _asked(devices: abc.Mapping[DeviceNumber, str]) -> list[Holder]:
    """Ask the service for the holders. Raises: OSError; ValueError for an invalid answer."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as service:
        service.settimeout(_ANSWERS_WITHIN_S)
        service.connect(str(names.HOLDERS_SOCKET))
        for number, name in devices.items():
            service.sendall(f"{number} {name}\n".encode())
        service.shutdown(socket.SHUT_WR)
        with service.makefile("rb") as answer:
            holders = [Holder(**json.loads(line)) for line in answer]
    if not holders or holders.pop() != _END:
        raise ValueError("the answer is cut short")
    return holders


def answer(question: TextIO, to: TextIO) -> None:
    """Answer the question of `openers`: a line of JSON for each holder, one for the end.

    Raises: ValueError for another question.
    """
    lines = [line.removesuffix("\n").partition(" ") for line in question]
    devices = {DeviceNumber.from_text(number): name for number, _, name in lines}
    for holder in [*search(devices), _END]:
        to.write(f"{json.dumps(asdict(holder))}\n")


@dataclass(frozen=True, slots=True)
class _Copy:
    """A mount of the mapping in a process's namespace."""

    mount: Mount
    groups: frozenset[int]
    """Its peer groups, and those from which it receives (mount_namespaces(7))."""


def search(devices: abc.Mapping[DeviceNumber, str]) -> list[Holder]:
    """Search /proc for holders of the devices, as far as this process may see into others.

    A copy of the mount in another namespace is no use if it is unmounted with the host's. Such are
    those of services that systemd confines: their namespaces receive the host's unmounts.

    Source: proc_pid_fd(5), proc_pid_cwd(5), proc_pid_maps(5), proc_pid_mountinfo(5).
    """
    sources = set()
    for number, name in devices.items():
        is_node = name.startswith("/")
        sources |= {name} if is_node else {f"/dev/dm-{number.minor}", f"/dev/mapper/{name}"}

    def copies(process: Path) -> list[_Copy]:
        listed = _mounts(process)
        return [copy for copy in listed if _shows(copy.mount, devices, sources)]

    here = copies(_PROC / "1")
    groups = frozenset[int]().union(*(copy.groups for copy in here))
    known = {copy.mount.identity for copy in here}
    found: list[Holder] = []
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError):  # it has ended, or has a mount of an unknown form
            if int(process.name) == os.getpid():
                continue
            there = copies(process)
            pid = int(process.name)
            used = list(_few(_uses(process, [*sources, *(copy.mount.point for copy in there)])))
            if not used and not there:
                continue
            command = (process / "comm").read_text(errors="backslashreplace").strip()
            found += [Holder(pid, command, words) for words in used]
            own = [c for c in there if c.mount.identity not in known and not c.groups & groups]
            if own and not used:
                words = f"has it mounted at {own[0].mount.point} in a mount namespace of its own"
                found.append(Holder(pid, command, words, is_user=False))
    return found or list(_in_detached_mounts(devices))


def _shows(mount: Mount, devices: abc.Container[DeviceNumber], nodes: abc.Container[str]) -> bool:
    names_it = mount.filesystem in NAMES_ITS_DEVICE and mount.source in nodes
    return mount.number in devices or names_it


def _in_detached_mounts(devices: abc.Container[DeviceNumber]) -> Iterator[Holder]:
    """Yield who uses the devices by a mount that is in no namespace any more."""
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError):  # as above
            if int(process.name) == os.getpid():
                continue
            links = [*map(process.joinpath, _LINKS), *(process / "fd").iterdir()]
            linked = detached_files.linked(process, links, devices)
            used = [_LINKS.get(link.name, "has {} open").format(_link(link)) for link in linked]
            used += [f"has {path} in memory" for path in detached_files.mapped(process, devices)]
            if used:
                command = (process / "comm").read_text(errors="backslashreplace").strip()
                for words in _few(iter(dict.fromkeys(used))):
                    words_of_all = f"{words}, in a mount that was detached"
                    yield Holder(int(process.name), command, words_of_all)


def end(mapping: Mapping, number: int, within_s: float) -> None:
    """Send every user of the mapping the signal, and wait until it has ended or its time is up.

    A process that only has a copy of the mount gets none: it may be any, and would not release it.
    Source: pidfd_open(2), pidfd_send_signal(2), with which a process that ends meanwhile cannot be
    mistaken for another of its number.
    """
    deadline = time.monotonic() + within_s
    waiting = select.poll()
    opened: dict[int, int] = {}
    try:
        for pid in _users(mapping):
            with suppress(ProcessLookupError):
                opened[pid] = os.pidfd_open(pid)
        running = 0
        for pid in _users(mapping):  # else another process has the number by now
            if pid in opened:
                with suppress(ProcessLookupError):
                    signal.pidfd_send_signal(opened[pid], number)
                    waiting.register(opened[pid], select.POLLIN)
                    running += 1
        while running and (left_s := deadline - time.monotonic()) > 0:
            for process, _ in waiting.poll(left_s * 1000):
                waiting.unregister(process)
                running -= 1
    finally:
        for process in opened.values():
            os.close(process)


def _users(mapping: Mapping) -> set[int]:
    return {holder.pid for holder in find(mapping) if holder.is_user}


def _few(uses: Iterator[str]) -> Iterator[str]:
    """Yield the first uses and the number of the others: a process can have very many."""
    for use in islice(uses, _USES_REPORTED):
        yield use if len(use) <= _USE_LENGTH else f"{use[:_USE_LENGTH]}…"
    more = sum(1 for _ in uses)
    if more:
        yield f"uses {more} more files there"


def _uses(process: Path, points: list[str]) -> Iterator[str]:
    for name, words in _LINKS.items():
        if (path := _link(process / name)) is not None and _lies_in(path, points):
            yield words.format(path)
    with suppress(OSError):
        opened = dict.fromkeys(map(_link, (process / "fd").iterdir()))
        yield from (f"has {path} open" for path in opened if path and _lies_in(path, points))
    with suppress(OSError):
        lines = (process / "maps").read_text(errors="surrogateescape").splitlines()
        mapped = dict.fromkeys(
            fields[5] for line in lines if len(fields := line.split(None, 5)) > 5
        )
        yield from (f"has {path} in memory" for path in mapped if _lies_in(path, points))


def _link(file: Path) -> str | None:
    try:
        return str(file.readlink())
    except OSError:  # a thread of the kernel has none; this process may not see others'
        return None


def _lies_in(path: str, points: list[str]) -> bool:
    return any(path == point or path.startswith(f"{point.rstrip('/')}/") for point in points)


_GROUPS: Final = re.compile(rb" (?:shared|master):([0-9]+)")


def _mounts(process: Path) -> list[_Copy]:
    """Read the process's mounts. Raises: ValueError for a line of an unknown form."""
    try:
        lines = (process / "mountinfo").read_bytes().split(b"\n")
    except OSError:
        return []
    return [_copy(line) for line in lines if line]


def _copy(line: bytes) -> _Copy:
    mount = mountinfo.parse_mount(line.decode(errors="surrogateescape"))
    optional = line.partition(b" - ")[0]  # a name has no blank in it: the kernel escapes them
    return _Copy(mount, frozenset(map(int, _GROUPS.findall(optional))))
