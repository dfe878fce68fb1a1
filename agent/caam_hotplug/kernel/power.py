"""Power off a disk before it is pulled: stop it, and switch its USB port off."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.model import Volume

log = logging.getLogger(__name__)

_SYS_BLOCK: Final = Path("/sys/class/block")
_SG_IO: Final = 0x2285
_SG_DXFER_NONE: Final = -1
_START_STOP: Final = bytes([0x1B, 0, 0, 0, 0, 0])
"""START STOP UNIT with neither START nor LOEJ: stop (SBC-4, 5.25)."""
_BUILT_IN: Final = {"fixed", "hardwired"}
_TIMEOUT_MS: Final = 10_000


class _SgIo(ctypes.Structure):
    """struct sg_io_hdr of scsi/sg.h; ctypes lays it out as C does."""

    _fields_ = (
        ("interface_id", ctypes.c_int),
        ("dxfer_direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    )


def off(disk: Volume) -> None:
    """Stop the disk and switch its USB port off, as far as they can be.

    The caller holds the disk exclusively. A port stays on for a reader that is built in, or that
    has other disks: cards in other slots.
    Raises: KernelError. Blocks for I/O. Source: sd(4), SBC-4;
    Documentation/ABI/testing/sysfs-bus-usb (`remove`).
    """
    try:
        # The command to stop needs a descriptor for writing (scsi_cmd_allowed, scsi_ioctl.c). At
        # its close udevd would read the partitions anew; the kernel refuses that while it is held.
        opened = os.open(disk.node, os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EACCES}:  # a write-protected one is not stopped
            raise KernelError("power off", disk.node, error.errno or 0) from error
    else:
        try:
            _stop(opened, disk.node)
        finally:
            os.close(opened)
    _switch_port_off((_SYS_BLOCK / disk.name).resolve())


def _stop(opened: int, node: str) -> None:
    """Send the disk a command to stop; other disks than SCSI's know none."""
    command = ctypes.create_string_buffer(_START_STOP, len(_START_STOP))
    sense = ctypes.create_string_buffer(32)
    request = _SgIo(
        interface_id=ord("S"),
        dxfer_direction=_SG_DXFER_NONE,
        cmd_len=len(command),
        mx_sb_len=len(sense),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=_TIMEOUT_MS,
    )
    try:
        fcntl.ioctl(opened, _SG_IO, request)
    except OSError as error:  # no SCSI disk: a card, or a virtual disk
        log.debug("%s cannot be stopped: %s", node, os.strerror(error.errno or 0))


def _switch_port_off(disk: Path) -> None:
    """Disconnect the USB device above the disk, if there is one with no other disk."""
    for above in disk.parents:
        remove = above / "remove"
        if (above / "busnum").exists() and remove.exists():
            disks = [b for b in _SYS_BLOCK.iterdir() if b.resolve().parent.name == "block"]
            others = [b for b in disks if above in b.resolve().parents and b.name != disk.name]
            if others or _is_built_in(above):
                return
            try:
                remove.write_text("1")
            except OSError as error:
                raise KernelError("switch off the port of", str(above), error.errno or 0) from error
            return


def _is_built_in(device: Path) -> bool:
    """Return whether the board's description calls the USB device built in: not to be replugged."""
    described = (device / "removable", device / "port" / "connect_type")
    return any(file.exists() and file.read_text().strip() in _BUILT_IN for file in described)
