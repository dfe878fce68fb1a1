"""Who keeps a filesystem from being unmounted: files, directories, programs, namespaces.

All is read as text from /proc. No path of another process is opened or looked at, since it may lead
to a file system that hangs. What belongs to other users can be read with CAP_SYS_PTRACE only.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Final, TextIO

from caam_hotplug import names
from caam_hotplug.kernel import filesystem
from caam_hotplug.model import DeviceNumber, Holder, Mapping, Mount

log = logging.getLogger(__name__)

_PROC: Final = Path("/proc")
_ANSWERS_WITHIN_S: Final = 30.0
"""A program has to start for the answer, on a slow processor."""
_END: Final = Holder(0, "", "")
"""What follows the last holder in an answer, which is else cut short."""
_LINKS: Final = {
    "cwd": "works in {}",
    "root": "has {} as its root",
    "exe": "runs {}",
}


def find(mapping: Mapping) -> list[Holder]:
    """Those that use a filesystem of the mapping.

    Who may look into others is asked; without somebody who may, it is as much as this process may
    see. Blocks for as long as the answer takes.
    """
    try:
        return _asked(mapping)
    except (OSError, ValueError) as error:
        log.debug("nobody answers at %s: %s", names.HOLDERS_SOCKET, error)
        return look(mapping.number, mapping.name)


def _asked(mapping: Mapping) -> list[Holder]:
    """Raises: OSError; ValueError for an answer of another form."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as service:
        service.settimeout(_ANSWERS_WITHIN_S)
        service.connect(str(names.HOLDERS_SOCKET))
        service.sendall(f"{mapping.number} {mapping.name}\n".encode())
        service.shutdown(socket.SHUT_WR)
        with service.makefile("rb") as answer:
            holders = [Holder(**json.loads(line)) for line in answer]
    if not holders or holders.pop() != _END:
        raise ValueError("the answer is cut short")
    return holders


def answer(question: TextIO, to: TextIO) -> None:
    """The question that `find` asks is answered: a line of JSON for each holder, one for the end.

    Raises: ValueError for another question.
    """
    number, _, name = question.readline().removesuffix("\n").partition(" ")
    for holder in [*look(DeviceNumber.from_text(number), name), _END]:
        to.write(f"{json.dumps(asdict(holder))}\n")


def look(number: DeviceNumber, name: str) -> list[Holder]:
    """Those that use a filesystem of the mapping, as far as this process may look into others.

    Source: proc_pid_fd(5), proc_pid_cwd(5), proc_pid_maps(5), proc_pid_mountinfo(5).
    """
    sources = {f"/dev/dm-{number.minor}", f"/dev/mapper/{name}"}

    def mounts(process: Path) -> list[Mount]:
        listed = _mounts(process)
        return [mount for mount in listed if mount.number == number or mount.source in sources]

    here = {mount.identity for mount in mounts(_PROC / "1")}
    found: list[Holder] = []
    for process in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # it has ended
            if int(process.name) == os.getpid():
                continue
            held = _held(process, mounts(process), here)
            command = (process / "comm").read_text(errors="backslashreplace").strip()
            found += [Holder(int(process.name), command, words) for words in held]
    return found


def end(mapping: Mapping, number: int, within_s: float) -> None:
    """Every user of the mapping has been sent the signal, and has ended or had its time.

    Source: pidfd_open(2), pidfd_send_signal(2): a process that ends meanwhile cannot be mistaken
    for another one of its number.
    """
    deadline = time.monotonic() + within_s
    waiting = select.poll()
    opened: set[int] = set()
    try:
        for pid in {holder.pid for holder in find(mapping)}:
            with suppress(ProcessLookupError):
                opened.add(process := os.pidfd_open(pid))
                if pid not in {holder.pid for holder in find(mapping)}:
                    continue  # another process has this number now
                signal.pidfd_send_signal(process, number)
                waiting.register(process, select.POLLIN)
        left = len(opened)
        while left and (rest_s := deadline - time.monotonic()) > 0:
            for process, _ in waiting.poll(rest_s * 1000):
                waiting.unregister(process)
                left -= 1
    finally:
        for process in opened:
            os.close(process)


def _held(process: Path, mounts: list[Mount], here: set[int]) -> Iterator[str]:
    if not mounts:
        return
    points = [mount.point for mount in mounts]
    said = False
    for words in _uses(process, points):
        said = True
        yield words
    if not said and not any(mount.identity in here for mount in mounts):
        yield f"has it mounted at {points[0]} in a mount namespace of its own"


def _uses(process: Path, points: list[str]) -> Iterator[str]:
    for name, words in _LINKS.items():
        if (path := _link(process / name)) is not None and _lies_in(path, points):
            yield words.format(path)
    with suppress(OSError):
        for file in (process / "fd").iterdir():
            if (path := _link(file)) is not None and _lies_in(path, points):
                yield f"has {path} open"
    with suppress(OSError):
        lines = (process / "maps").read_text(errors="surrogateescape").splitlines()
        mapped = dict.fromkeys(
            fields[5] for line in lines if len(fields := line.split(None, 5)) > 5
        )
        yield from (f"has {path} in memory" for path in mapped if _lies_in(path, points))


def _link(file: Path) -> str | None:
    try:
        return str(file.readlink())
    except OSError:  # a thread of the kernel has none; others' are not to be looked at
        return None


def _lies_in(path: str, points: list[str]) -> bool:
    return any(path == point or path.startswith(f"{point.rstrip('/')}/") for point in points)


def _mounts(process: Path) -> list[Mount]:
    try:
        lines = (process / "mountinfo").read_bytes().split(b"\n")
    except OSError:
        return []
    return [filesystem.parse_mount(line.decode(errors="surrogateescape")) for line in lines if line]
