"""Moments when media were reported, mounted, and gone: an outside view, on the monotonic clock.

Announced changes are waited for: the kernel's events, udev's, and changes of the mount table. The
end of a mapping, of its key and of the mount point is polled: the event of a mapping's removal
precedes its end (dev_remove in drivers/md/dm-ioctl.c), and keys have no events.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

DEADLINE_S: Final = 60
LEFT_AFTER_S: Final = 10
"""Time after the removal of a medium when anything that remains counts as left over."""
LOOKED_FOR_EVERY_S: Final = 0.002
KERNEL_GROUP: Final = 1
UDEV_GROUP: Final = 2
NETLINK_KOBJECT_UEVENT: Final = 15
"""From linux/netlink.h; Python has no name for it."""
SO_RCVBUFFORCE: Final = 33
UDEV_QUEUE: Final = Path("/run/udev/queue")
"""Present while udevd has unhandled events (udev_queue_get_queue_is_empty in libudev)."""
BLOCKS: Final = Path("/sys/class/block")
KEYS: Final = Path("/proc/keys")

GONE: Final = ("mount gone", "mapping gone", "key gone", "directory gone")
"""Moments after which nothing is left."""


class NothingHappenedError(Exception):
    """An awaited change has not come."""


def properties(event: bytes) -> dict[str, str]:
    """Return the properties of an event, the kernel's or udev's; its header has no equals sign."""
    texts = (text.partition(b"=") for text in event.split(b"\0"))
    return {
        key.decode(errors="replace"): value.decode(errors="replace")
        for key, equals, value in texts
        if equals
    }


def mount_points(mountinfo: bytes) -> set[str]:
    """Return the paths where something is mounted."""
    return {line.split()[4].decode(errors="replace") for line in mountinfo.splitlines()}


def logon_keys(listed: bytes) -> int:
    """Count the logon keys in all keyrings, from the text of /proc/keys.

    A key whose usage count is 0 does not count: the kernel's collector has yet to free it
    (security/keys/gc.c).
    """
    lines = (line.split() for line in listed.splitlines())
    return sum(fields[7] == b"logon" and fields[2] != b"0" for fields in lines)


class Watcher:
    """Records when media arrive and depart, one or many at once; no others may do so meanwhile."""

    def __init__(self) -> None:
        self._points: set[str] = set()
        self._before = (0, 0)
        """Numbers of mappings and logon keys before the medium came."""
        self._seen: dict[str, float] = {}
        self._sockets = {"kernel": _listener(KERNEL_GROUP), "udev": _listener(UDEV_GROUP)}
        self._mountinfo = open("/proc/self/mountinfo", "rb")  # noqa: SIM115  closed in close()
        self._poll = select.poll()
        for listener in self._sockets.values():
            self._poll.register(listener, select.POLLIN)
        self._poll.register(self._mountinfo, select.POLLPRI | select.POLLERR)
        self._mounted: set[str] = set()

    def close(self) -> None:
        """Stop listening."""
        for listener in self._sockets.values():
            listener.close()
        self._mountinfo.close()

    def arrival(self, plug: Callable[[], None], points: Iterable[Path]) -> dict[str, float]:
        """Plug media; return the moments of the plug, the first reports, and the last mount.

        Raises: NothingHappenedError.
        """
        self._points = set(map(str, points))
        self._read_mounts(time.monotonic())
        self._before = (mappings(), logon_keys(KEYS.read_bytes()))
        awaited = ("kernel add", "udev add", "mounted")
        within_s = DEADLINE_S * len(self._points)
        seen = self._watched(plug, "plugged", awaited, within_s)
        if missing := [moment for moment in awaited if moment not in seen]:
            raise NothingHappenedError(f"not seen within {within_s} s: {', '.join(missing)}")
        return seen

    def departure(self, pull: Callable[[], None], stays: Sequence[str] = ()) -> dict[str, float]:
        """Pull media; return the moments of the kernel's first report and of each object's end.

        Leftovers have no moment; `stays` names moments that are not waited for.

        Raises: NothingHappenedError.
        """
        awaited = ("kernel remove", *(moment for moment in GONE if moment not in stays))
        seen = self._watched(pull, "pulled", awaited, LEFT_AFTER_S * len(self._points))
        if "kernel remove" not in seen:
            raise NothingHappenedError("the kernel has not reported the removal")
        return seen

    def settle(self) -> None:
        """Wait until udevd has nothing more to do. Raises: NothingHappenedError."""
        end = time.monotonic() + DEADLINE_S
        while UDEV_QUEUE.exists():
            if time.monotonic() > end:
                raise NothingHappenedError(f"udevd is busy after {DEADLINE_S} s")
            self._wait(0.02)

    def _watched(
        self, act: Callable[[], None], begun: str, awaited: Sequence[str], within_s: float
    ) -> dict[str, float]:
        self._wait(0)
        self._seen = {}
        with _undisturbed(act) as started:
            self._seen[begun] = started
            end = started + within_s
            while time.monotonic() < end and not self._seen.keys() >= set(awaited):
                if "kernel remove" in self._seen:
                    self._wait(LOOKED_FOR_EVERY_S)
                    self._check_for_the_end()
                else:
                    self._wait(1)
        return self._seen

    def _wait(self, timeout_s: float) -> None:
        """Record what has been announced; wait for it until the timeout."""
        ready = {fileno for fileno, _ in self._poll.poll(timeout_s * 1000)}
        for source, listener in self._sockets.items():
            while True:
                try:
                    event = listener.recv(65536)
                except BlockingIOError:
                    break
                self._note(source, time.monotonic(), properties(event))
        # After the events, which mounts and unmounts follow.
        if self._mountinfo.fileno() in ready:
            self._read_mounts(time.monotonic())

    def _note(self, source: str, now: float, event: dict[str, str]) -> None:
        if event.get("SUBSYSTEM") == "block" and event.get("DEVTYPE") == "partition":
            self._seen.setdefault(f"{source} {event.get('ACTION')}", now)

    def _read_mounts(self, now: float) -> None:
        self._mountinfo.seek(0)
        mounted = self._points & mount_points(self._mountinfo.read())
        if mounted != self._mounted and mounted == self._points:
            self._seen.setdefault("mounted", now)
        if mounted != self._mounted and not mounted:
            self._seen.setdefault("mount gone", now)
        self._mounted = mounted

    def _check_for_the_end(self) -> None:
        """Check each object until it is gone."""
        there: dict[str, Callable[[], bool]] = {
            "mapping gone": lambda: mappings() > self._before[0],
            "key gone": lambda: logon_keys(KEYS.read_bytes()) > self._before[1],
            "directory gone": lambda: any(map(os.path.exists, self._points)),
        }
        for moment, is_there in there.items():
            if moment not in self._seen and not is_there():
                self._seen[moment] = time.monotonic()


def mappings() -> int:
    """Count the mappings."""
    return sum(name.startswith("dm-") for name in os.listdir(BLOCKS))


def _listener(group: int) -> socket.socket:
    listener = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_KOBJECT_UEVENT)
    listener.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 16 << 20)
    listener.bind((0, group))
    listener.setblocking(False)
    return listener


@contextmanager
def _undisturbed(act: Callable[[], None]) -> Iterator[float]:
    """Act in a thread, since the kernel takes its time; yield the moment when it began."""
    acting = threading.Thread(target=act)
    gc.disable()
    try:
        started = time.monotonic()
        acting.start()
        yield started
        acting.join()
    finally:
        gc.enable()
