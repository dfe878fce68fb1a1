"""SCSI commands that stop and start a disk, which no system call does (SG_IO of sd(4))."""

from __future__ import annotations

import ctypes
import fcntl
from typing import Final

_SG_IO: Final = 0x2285
_SG_DXFER_NONE: Final = -1
_TEST_UNIT_READY: Final = bytes(6)
_START: Final = bytes([0x1B, 0, 0, 0, 1, 0])
"""START STOP UNIT with START, and without LOEJ (SBC-4, 5.25)."""
_STOP: Final = bytes([0x1B, 0, 0, 0, 0, 0])
_STOPPED: Final = (0x2, 0x04, 0x02)
"""Sense of a stopped disk: not ready, logical unit not ready, initializing command required."""
_AT_ONCE_MS: Final = 10_000
_UNTIL_IT_RUNS_MS: Final = 60_000
_DESCRIPTORS: Final = {0x72, 0x73}
"""Response codes of sense data in descriptor format (SPC-4, 4.5.2)."""


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


def is_stopped(opened: int) -> bool:
    """Return whether the open disk was stopped, and waits for a command to start.

    The answer may have been meant for the kernel: that a medium was changed is reported once. So
    the kernel's own command comes first. Raises: OSError for no SCSI disk.
    """
    return sense_of(_command(opened, _TEST_UNIT_READY, _AT_ONCE_MS)) == _STOPPED


def start(opened: int) -> None:
    """Start the disk, open for writing, and wait until it runs. Raises: OSError."""
    _command(opened, _START, _UNTIL_IT_RUNS_MS)


def stop(opened: int) -> None:
    """Stop the disk, open for writing; it writes its cache first. Raises: OSError."""
    _command(opened, _STOP, _AT_ONCE_MS)


def sense_of(said: bytes) -> tuple[int, int, int] | None:
    """Return key, code and qualifier of sense data; None if there are none.

    Source: SPC-4, 4.5 (fixed and descriptor format).
    """
    if said[:1] and said[0] & 0x7F in _DESCRIPTORS:
        return (said[1] & 0xF, said[2], said[3]) if len(said) > 3 else None
    return (said[2] & 0xF, said[12], said[13]) if len(said) > 13 else None


def _command(opened: int, block: bytes, timeout_ms: int) -> bytes:
    """Send a command that moves no data, and return its sense data. Raises: OSError.

    Commands but those that only read need a descriptor for writing (scsi_cmd_allowed in
    drivers/scsi/scsi_ioctl.c).
    """
    command = ctypes.create_string_buffer(block, len(block))
    sense = ctypes.create_string_buffer(32)
    request = _SgIo(
        interface_id=ord("S"),
        dxfer_direction=_SG_DXFER_NONE,
        cmd_len=len(command),
        mx_sb_len=len(sense),
        cmdp=ctypes.addressof(command),
        sbp=ctypes.addressof(sense),
        timeout=timeout_ms,
    )
    fcntl.ioctl(opened, _SG_IO, request)
    return sense.raw[: request.sb_len_wr]
