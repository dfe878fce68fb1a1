"""Filesystems: what lies on a device, mounting it, and what is mounted where."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from caam_hotplug.errors import KernelError, MountBusyError, MountError
from caam_hotplug.kernel import ctypes_lib
from caam_hotplug.model import DeviceNumber, Mount

_LIBBLKID: Final = "libblkid.so.1"
_BLKID_FLTR_ONLYIN: Final = 2
_AMBIVALENT: Final = -2
_BLKID_SUBLKS_LABEL: Final = 1 << 1
_BLKID_SUBLKS_UUID: Final = 1 << 3
_BLKID_SUBLKS_TYPE: Final = 1 << 5
_BLKID_PARTS_ENTRY_DETAILS: Final = 1 << 2

# The numbers are the same on every architecture (asm-generic/unistd.h).
_SYS_MOVE_MOUNT, _SYS_FSOPEN, _SYS_FSCONFIG, _SYS_FSMOUNT = 429, 430, 431, 432
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_SET_FLAG, _FSCONFIG_SET_STRING, _FSCONFIG_CMD_CREATE = 0, 1, 6
_FSMOUNT_CLOEXEC: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 0x04
_MOVE_MOUNT_T_EMPTY_PATH: Final = 0x40

_MOUNT_ATTR_RDONLY: Final = 0x01
_MOUNT_ATTRS: Final = {
    "nosuid": 0x02,
    "nodev": 0x04,
    "noexec": 0x08,
    "relatime": 0x00,
    "noatime": 0x10,
    "strictatime": 0x20,
    "nodiratime": 0x80,
    "nosymfollow": 0x200000,
}

_WITHOUT_REPLAY: Final[dict[str, tuple[str, ...]]] = {
    "ext4": ("noload",),
    "xfs": ("norecovery", "nouuid"),
    "btrfs": ("rescue=nologreplay",),
    "f2fs": ("norecovery",),
}

_FORGETFUL: Final = {"tmpfs", "ramfs"}
_UPPER: Final = re.compile(r"(?:^|,)upperdir=([^,]+)")

_MOUNTINFO: Final = Path("/proc/self/mountinfo")

_MNT_DETACH: Final = 2
_BLKFLSBUF: Final = 0x1261
_PIECE: Final = 512
_LARGEST_SECTOR: Final = 4096
"""Of dm-crypt."""
_UMOUNT_NOFOLLOW: Final = 8


@dataclass(frozen=True, slots=True)
class Identity:
    """What libblkid reads off a device; None for what it does not have."""

    type: str | None
    label: str | None
    uuid: str | None
    partlabel: str | None = None
    partuuid: str | None = None
    parttype: str | None = None


class _Probe:
    """libblkid's functions, declared at the first probe."""

    def __init__(self) -> None:
        def function(name: str, result: Any, *arguments: Any) -> Any:
            return ctypes_lib.declare(_LIBBLKID, name, result, arguments)

        probe, flag, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
        self.new = function("blkid_new_probe", probe)
        self.free = function("blkid_free_probe", None, probe)
        self.set_device = function(
            "blkid_probe_set_device", flag, probe, flag, ctypes.c_int64, ctypes.c_int64
        )
        self.enable_superblocks = function("blkid_probe_enable_superblocks", flag, probe, flag)
        self.superblocks_flags = function("blkid_probe_set_superblocks_flags", flag, probe, flag)
        self.superblocks_only = function(
            "blkid_probe_filter_superblocks_type", flag, probe, flag, ctypes.POINTER(text)
        )
        self.enable_partitions = function("blkid_probe_enable_partitions", flag, probe, flag)
        self.partitions_flags = function("blkid_probe_set_partitions_flags", flag, probe, flag)
        self.safeprobe = function("blkid_do_safeprobe", flag, probe)
        self.lookup = function(
            "blkid_probe_lookup_value", flag, probe, text, ctypes.POINTER(text),
            ctypes.POINTER(ctypes.c_size_t),
        )  # fmt: skip


_loaded: list[_Probe] = []


def _blkid() -> _Probe:
    if not _loaded:
        _loaded.append(_Probe())
    return _loaded[0]


def prepare() -> None:
    """libblkid is open. Raises: OSError if it is not installed."""
    _blkid()


def probe(node: str, allowed: Sequence[str]) -> str | None:
    """The type of the filesystem on the device, if it is one of those allowed, else None.

    Only the allowed types' own detectors look at the bytes. Raises: KernelError if the device
    cannot be read. Blocks for I/O. Source: blkid_do_safeprobe in libblkid.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        wanted = (ctypes.c_char_p * (len(allowed) + 1))(*(name.encode() for name in allowed), None)
        blkid.enable_superblocks(pr, 1)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        blkid.superblocks_only(pr, _BLKID_FLTR_ONLYIN, wanted)
        found = _value(pr, "TYPE") if _found(pr, node) else None
    return None if found == "vfat" and not _has_fat(node) else found


def _has_fat(node: str) -> bool:
    """Whether the file allocation tables of a vfat are such, and not noise.

    With another sector_size than the medium was made with, the first 512 bytes of each larger
    sector still come out right, and the rest does not, or not quite (with CBC, the first 16 bytes
    of each 512). Of a small vfat the kernel checks no more than libblkid does, and would mount
    that. Every table begins with a media descriptor filled up with ones, and a mark of an end. Two
    tables are alike but for what a pull in between has left: what differs everywhere, save for
    where it comes out right anyway, is noise. One table alone that begins well is taken for one.
    Source: Microsoft's FAT specification (fatgen103), BPB, FAT[0] and FAT[1].
    """
    try:
        with Path(node).open("rb", buffering=0) as device:
            boot = device.read(_PIECE)
            sector, reserved, count, short = struct.unpack_from("<H x H B 5x H", boot, 11)
            (long,) = struct.unpack_from("<I", boot, 36)
            first, length = sector * reserved, (short or long) * sector
            tables = []
            for at in (first, first + length)[:count]:
                device.seek(at)
                tables.append((at, device.read(min(length, _LARGEST_SECTOR))))
    except (OSError, struct.error) as error:
        number = error.errno if isinstance(error, OSError) else None
        raise KernelError("read", node, number or errno.EIO) from error
    if not tables or not _begins_as_fat(tables[0][1]):
        return False
    telling = [
        [table[start : start + _PIECE] for _, table in tables]
        for start in range(0, min(len(table) for _, table in tables), _PIECE)
        if all((at + start) % _LARGEST_SECTOR for at, _ in tables)
    ]
    return len(telling) < 2 or any(len(set(pieces)) == 1 for pieces in telling)


def _begins_as_fat(table: bytes) -> bool:
    """FAT[0] and FAT[1] of 12 bits, 16 or 32: the last bits of the second may be any."""
    return len(table) > 2 and table[0] & table[2] & 0xF0 == 0xF0 and table[1] & 0x0F == 0x0F


def recognised(node: str) -> str | None:
    """What is known of that lies on the device, in words; None if nothing is.

    All of libblkid's detectors look. Raises: KernelError. Blocks for I/O.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        blkid.enable_superblocks(pr, 1)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE)
        blkid.enable_partitions(pr, 1)
        result = int(blkid.safeprobe(pr))
        if result == _AMBIVALENT:
            return "signatures of more than one kind"
        _require_read(result, node)
        what, table = _value(pr, "TYPE"), _value(pr, "PTTYPE")
        if what is not None:
            return f"{what} (a filesystem, or a header)"
        return None if table is None else f"a partition table ({table})"


def identify(node: str, *, contents: bool = True) -> Identity:
    """What a volume says of itself: its entry in the partition table, a header such as LUKS.

    Without `contents` the partition's own bytes are not looked at, and the entry is all.
    Raises: KernelError. Blocks for I/O. Source: blkid_probe_set_partitions_flags in libblkid.
    """
    blkid = _blkid()
    with _probing(node) as pr:
        blkid.enable_superblocks(pr, contents)
        blkid.superblocks_flags(pr, _BLKID_SUBLKS_TYPE | _BLKID_SUBLKS_LABEL | _BLKID_SUBLKS_UUID)
        blkid.enable_partitions(pr, 1)
        blkid.partitions_flags(pr, _BLKID_PARTS_ENTRY_DETAILS)
        _found(pr, node)
        return Identity(
            type=_value(pr, "TYPE"),
            label=_value(pr, "LABEL"),
            uuid=_value(pr, "UUID"),
            partlabel=_value(pr, "PART_ENTRY_NAME"),
            partuuid=_value(pr, "PART_ENTRY_UUID"),
            parttype=_value(pr, "PART_ENTRY_TYPE"),
        )


@contextmanager
def _probing(node: str) -> Iterator[int]:
    blkid = _blkid()
    try:
        file = os.open(node, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise KernelError("open", node, error.errno or 0) from error
    try:
        pr = blkid.new()
        if not pr:
            raise KernelError("probe", node, errno.ENOMEM)
        try:
            if blkid.set_device(pr, file, 0, 0) != 0:
                raise KernelError("probe", node, ctypes.get_errno() or errno.EIO)
            yield pr
        finally:
            blkid.free(pr)
    finally:
        os.close(file)


def _found(pr: int, node: str) -> bool:
    """Whether the probe found one thing: 0 yes, 1 nothing, -2 more than one, else minus an errno.

    A device that cannot be read must not pass for one with nothing on it.
    """
    result = int(_blkid().safeprobe(pr))
    if result != _AMBIVALENT:
        _require_read(result, node)
    return result == 0


def _require_read(result: int, node: str) -> None:
    if result < 0:
        number = -result if result < -1 else ctypes.get_errno() or errno.EIO
        raise KernelError("probe", node, number)


def _value(pr: int, name: str) -> str | None:
    data, length = ctypes.c_char_p(), ctypes.c_size_t()
    found = _blkid().lookup(pr, name.encode(), ctypes.byref(data), ctypes.byref(length))
    if found != 0 or data.value is None:
        return None
    return data.value.decode(errors="replace")


def mount(
    node: str,
    kind: str,
    target: int,
    *,
    read_only: bool,
    options: Sequence[str],
    filesystem_options: Sequence[str],
) -> None:
    """The filesystem is mounted on the directory that the descriptor `target` stands for.

    Its flags hold from the first moment: it is configured and only then attached.
    Raises: MountError with the stage that failed and the kernel's own words. Blocks for I/O.
    Source: fsopen(2), fsconfig(2), fsmount(2), move_mount(2).
    """
    attributes = sum(_MOUNT_ATTRS[option] for option in set(options))
    attributes |= _MOUNT_ATTR_RDONLY if read_only else 0
    with _superblock(node, kind, filesystem_options, read_only=read_only) as context:
        mounted = _call(context, "mount", node, _SYS_FSMOUNT, context, _FSMOUNT_CLOEXEC, attributes)
        try:
            flags = _MOVE_MOUNT_F_EMPTY_PATH | _MOVE_MOUNT_T_EMPTY_PATH
            _call(context, "attach", node, _SYS_MOVE_MOUNT, mounted, b"", target, b"", flags)
        finally:
            os.close(mounted)


def require_readable(node: str, kind: str) -> None:
    """The kernel reads the filesystem, and writes nothing, not even what its journal has left.

    Raises: MountError. Blocks for I/O. Source: ext4(5), xfs(5), btrfs(5), f2fs.rst.
    """
    with _superblock(node, kind, _WITHOUT_REPLAY.get(kind, ()), read_only=True):
        pass


@contextmanager
def _superblock(node: str, kind: str, options: Sequence[str], *, read_only: bool) -> Iterator[int]:
    """The context of a filesystem that the kernel has read, to be mounted. Raises: MountError."""
    try:
        context = ctypes_lib.syscall(_SYS_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    except OSError as error:
        hint = "the kernel lacks this filesystem" if error.errno == errno.ENODEV else ""
        raise MountError("mount", f"{node} ({kind})", error.errno or 0, hint) from error
    try:
        _configure(context, "source", node, node)
        for option in options:
            key, _, value = option.partition("=")
            _configure(context, key, value or None, node)
        if read_only:
            _configure(context, "ro", None, node)
        _call(context, "mount", node, _SYS_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        yield context
    finally:
        os.close(context)


def _configure(context: int, key: str, value: str | None, node: str) -> None:
    command = _FSCONFIG_SET_FLAG if value is None else _FSCONFIG_SET_STRING
    encoded = None if value is None else value.encode()
    shown = key if value is None else f"{key}={value}"
    _call(
        context, f"set option {shown} for", node, _SYS_FSCONFIG, context, command, key.encode(),
        encoded, 0,
    )  # fmt: skip


def _call(context: int, operation: str, node: str, number: int, *arguments: Any) -> int:
    try:
        return ctypes_lib.syscall(number, *arguments)
    except OSError as error:
        raise MountError(operation, node, error.errno or 0, _kernel_words(context)) from error


def _kernel_words(context: int) -> str:
    """What the filesystem has written into its context, without the level letter before it."""
    words: list[str] = []
    try:
        while line := os.read(context, 8192):
            words.append(line.decode(errors="replace").strip()[2:])
    except OSError:  # ENODATA: nothing more was said
        pass
    return "; ".join(words)


def unmount(path: str, *, lazily: bool = False) -> None:
    """Nothing of ours is mounted at the path; lazily, whoever is inside may finish there.

    Raises: MountBusyError; MountError. Blocks for I/O unless lazily. Source: umount2(2).
    """
    umount2 = ctypes_lib.declare(
        "libc.so.6", "umount2", ctypes.c_int, (ctypes.c_char_p, ctypes.c_int),
        ctypes_lib.minus_one_is_failure,
    )  # fmt: skip
    try:
        umount2(os.fsencode(path), _UMOUNT_NOFOLLOW | (_MNT_DETACH if lazily else 0))
    except OSError as error:
        if error.errno in {errno.EINVAL, errno.ENOENT}:
            return
        kind = MountBusyError if error.errno == errno.EBUSY else MountError
        raise kind("unmount", path, error.errno or 0) from error


def flush(path: str, node: str) -> None:
    """Everything written to the filesystem at the path, of the device `node`, is on its medium.

    Raises: MountError. Blocks for I/O. Source: syncfs(2).
    """
    syncfs = ctypes_lib.declare(
        "libc.so.6", "syncfs", ctypes.c_int, (ctypes.c_int,), ctypes_lib.minus_one_is_failure
    )
    try:
        try:
            directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except PermissionError:
            _flush_from_below(node)
            return
        try:
            syncfs(directory)
        finally:
            os.close(directory)
    except OSError as error:
        raise MountError("flush", path, error.errno or 0) from error


def _flush_from_below(node: str) -> None:
    """As flush, where the filesystem's root is somebody's who lets nobody else in.

    Without CAP_DAC_READ_SEARCH we are nobody else. The kernel flushes a device's filesystem with
    the device (blkdev_flushbuf in block/ioctl.c), and fsync(2) says what became of metadata; that a
    file's data did not arrive is not told on this way.
    """
    device = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _BLKFLSBUF)
        os.fsync(device)
    finally:
        os.close(device)


def mounts() -> list[Mount]:
    """What is mounted in this process's namespace.

    Raises: MountError for a line of an unknown form, which might be one of ours.
    Source: proc_pid_mountinfo(5).
    """
    # Only a newline ends a line: the kernel escapes it in names, but no other line break.
    lines = _MOUNTINFO.read_bytes().split(b"\n")
    try:
        return [parse_mount(line.decode(errors="surrogateescape")) for line in lines if line]
    except ValueError as error:
        raise MountError("read", str(_MOUNTINFO), errno.EBADMSG, str(error)) from error


def why_forgetful(path: Path) -> str | None:
    """Why files there do not outlive a power cut, or None if they do, as far as can be told.

    Of an overlay that is for its upper directory to say, which may be hidden since. Raises:
    MountError. Source: proc_pid_mountinfo(5), overlayfs.rst.
    """
    above = {str(path), *map(str, path.parents)}
    found = []
    for line in _MOUNTINFO.read_bytes().split(b"\n"):
        text = line.decode(errors="surrogateescape")
        if text and parse_mount(text).point in above:
            found.append(text)
    nearest = max(found, key=lambda text: len(parse_mount(text).point), default="")
    kind = parse_mount(nearest).filesystem if nearest else ""
    if kind in _FORGETFUL:
        return f"that is on {kind}"
    if kind == "overlay":
        upper = _UPPER.search(nearest.rpartition(" ")[2])
        if upper is None or not Path(upper[1]).is_dir():
            return "that is on an overlay, and where that writes cannot be seen"
        return why_forgetful(Path(upper[1]))
    return None


@lru_cache(maxsize=512)  # the same lines are read again and again
def parse_mount(line: str) -> Mount:
    """One line of mountinfo; optional fields end with a lone dash.

    Raises: ValueError with the line for any other form.
    """
    left, _, right = line.partition(" - ")
    fields, of_superblock = left.split(" "), right.split(" ", 2)
    try:
        filesystem, source, superblock_options = of_superblock
        return Mount(
            number=DeviceNumber.from_text(fields[2]),
            point=_unescaped(fields[4]),
            source=_unescaped(source),
            read_only="ro" in fields[5].split(",") or "ro" in superblock_options.split(","),
            filesystem=filesystem,
            identity=int(fields[0]),
        )
    except (ValueError, IndexError) as error:
        raise ValueError(
            "expected a line of mountinfo such as '36 35 8:17 / /mnt rw - ext4 /dev/sdb1 rw', "
            f"found {line[:80]!a}"
        ) from error


_ESCAPE: Final = re.compile(rb"\\([0-3][0-7]{2})")


def _unescaped(field: str) -> str:
    """Blank, tab, newline, hash and backslash come as three octal digits (seq_escape).

    Any other backslash stands for itself: not every file system escapes its source whole.
    """
    raw = field.encode(errors="surrogateescape")
    plain = _ESCAPE.sub(lambda m: bytes([int(m[1], 8)]), raw)
    return plain.decode(errors="surrogateescape")
