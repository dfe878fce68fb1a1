"""The mounts of this process's namespace, from /proc/self/mountinfo."""

from __future__ import annotations

import errno
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Final

from caam_hotplug.errors import UnknownError
from caam_hotplug.formats import mount_options
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.kernel.reserve import spent_on
from caam_hotplug.model import DeviceNumber, Mount

NAMES_ITS_DEVICE: Final = {"bcachefs", "btrfs"}
"""Filesystems whose mounts have a number of their own, and whose source the kernel itself names."""
_VOLATILE: Final = {"tmpfs", "ramfs"}
_UPPER: Final = re.compile(r"(?:^|,)upperdir=([^,]+)")

_MOUNTINFO: Final = Path("/proc/self/mountinfo")
_AT_ONCE: Final = 64 << 10
_OF_DESCRIPTOR: Final = re.compile(rb"^mnt_id:\s*([0-9]+)$", re.MULTILINE)


def mounts() -> list[Mount]:
    """Return the mounts of this process's namespace.

    Raises: UnknownError if they cannot be read; also for a line of an unknown form, which might be
    a mount of the agent. Source: proc_pid_mountinfo(5).
    """
    # Only a newline ends a line: the kernel escapes it in names, but no other line break.
    with reported_as("read", str(_MOUNTINFO), UnknownError):
        content = spent_on(lambda: _content(_MOUNTINFO))
    try:
        return parsed(content)
    except ValueError as error:
        raise UnknownError("read", str(_MOUNTINFO), errno.EBADMSG, str(error)) from error


def mount_of(opened: int) -> int | None:
    """Return the number of the mount that the open file is in; None if the kernel says none.

    Raises: OSError. It does not ask the filesystem: an XFS that has shut down answers no stat(2)
    (xfs_vn_getattr in fs/xfs/xfs_iops.c). Source: proc_pid_fdinfo(5).
    """
    found = _OF_DESCRIPTOR.search(_content(Path(f"/proc/self/fdinfo/{opened}")))
    return None if found is None else int(found[1])


def mount_at(directory: int, name: str) -> int | None:
    """Return the number of the mount that is seen by this name in the open directory.

    Raises: OSError. It does not ask the filesystem, as `mount_of`.
    """
    opened = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        return mount_of(opened)
    finally:
        os.close(opened)


def _content(file: Path) -> bytes:
    """Return the file, without the calls that Python makes about a file of any kind."""
    opened = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(opened, _AT_ONCE), b""))
    finally:
        os.close(opened)


def parsed(content: bytes) -> list[Mount]:
    """Parse a whole file. Raises: ValueError for a line of an unknown form."""
    lines = content.split(b"\n")
    return [parse_mount(line.decode(errors="surrogateescape")) for line in lines if line]


def why_volatile(path: Path) -> str | None:
    """Return why files there do not outlive a power cut, or None if they seem to.

    An overlay's upper directory decides for it, which another mount may hide. Raises:
    OSError. Source: proc_pid_mountinfo(5), overlayfs.rst.
    """
    above = {str(path), *map(str, path.parents)}
    found = []
    for line in _MOUNTINFO.read_bytes().split(b"\n"):
        text = line.decode(errors="surrogateescape")
        if text and parse_mount(text).point in above:
            found.append(text)
    nearest = max(found, key=lambda text: len(parse_mount(text).point), default="")
    kind = parse_mount(nearest).filesystem if nearest else ""
    if kind in _VOLATILE:
        return f"that is on {kind}"
    if kind == "overlay":
        upper = _UPPER.search(nearest.rpartition(" ")[2])
        if upper is None or not Path(upper[1]).is_dir():
            return "that is on an overlay, and where that writes cannot be seen"
        return why_volatile(Path(upper[1]))
    return None


@lru_cache(maxsize=512)  # the same lines are read again and again
def parse_mount(line: str) -> Mount:
    """Parse a line of mountinfo; optional fields end with a lone dash.

    Raises: ValueError with the line for any other form.
    """
    left, _, right = line.partition(" - ")
    fields, of_superblock = left.split(" "), right.split(" ", 2)
    try:
        filesystem, source, shown = of_superblock
        superblock_options = shown.split(",")
        return Mount(
            number=DeviceNumber.from_text(fields[2]),
            point=unescaped(fields[4]),
            source=unescaped(source),
            read_only="ro" in fields[5].split(",") or "ro" in superblock_options,
            filesystem=filesystem,
            leaves_journal=mount_options.leaves_journal(superblock_options),
            identity=int(fields[0]),
            parent=int(fields[1]),
            is_filesystem_read_only="ro" in superblock_options,
            is_point_read_only="ro" in fields[5].split(","),
            stops_at_errors="errors=remount-ro" in superblock_options,
        )
    except (ValueError, IndexError) as error:
        raise ValueError(
            "expected a line of mountinfo such as '36 35 8:17 / /mnt rw - ext4 /dev/sdb1 rw', "
            f"found {line[:80]!a}"
        ) from error


_ESCAPE: Final = re.compile(rb"\\([0-3][0-7]{2})")


def unescaped(field: str) -> str:
    """Replace the octal escapes of blank, tab, newline, hash and backslash (seq_escape).

    Any other backslash stands for itself: not every file system escapes its source whole.
    """
    raw = field.encode(errors="surrogateescape")
    plain = _ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), raw)
    return plain.decode(errors="surrogateescape")
