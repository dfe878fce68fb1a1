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
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import Volume

log = logging.getLogger(__name__)

_SYS_BLOCK: Final = Path("/sys/class/block")
_SG_IO: Final = 0x2285
_SG_DXFER_NONE: Final = -1
_START_STOP: Final = bytes([0x1B, 0, 0, 0, 0, 0])
"""START STOP UNIT with neither START nor LOEJ: stop (SBC-4, 5.25)."""
_BUILT_IN: Final = {"fixed", "hardwired"}
_SCSI_TYPES: Final = "*:*/host*/target*/*/type"
"""Below a USB device: the type of each of its SCSI devices."""
_ENCLOSURE: Final = "13"
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

    The caller holds the disk exclusively. A port stays on for a reader that is built in, and for a
    device that is more than this disk. Raises: KernelError. Blocks for I/O. Source: sd(4), SBC-4;
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
    """Disconnect the USB device that the disk belongs to, if the device is nothing but this disk.

    `remove` takes the whole device away. Its other functions, in use or not, stay where they are,
    and then so does the disk, stopped. No hub is asked.
    """
    device = next((above for above in disk.parents if (above / "busnum").exists()), None)
    if device is None or not (device / "remove").exists():
        return
    with reported_as("switch off the port of", str(device)):
        if _is_built_in(device):
            return
        others = [*_other_interfaces(device, disk), *_other_units(device, disk)]
        if others:
            log.info("%s: its port stays on; the device has %s", disk.name, ", ".join(others))
            return
        (device / "remove").write_text("1")


def _is_built_in(device: Path) -> bool:
    """Return whether the board's description calls the USB device built in: not to be replugged."""
    described = (device / "removable", device / "port" / "connect_type")
    return any(file.exists() and file.read_text().strip() in _BUILT_IN for file in described)


def _other_interfaces(device: Path, disk: Path) -> list[str]:
    """Name the USB device's interfaces but for the disk's own, with their class.

    One without a driver counts: programs use it through /dev/bus/usb. Source:
    Documentation/ABI/testing/sysfs-bus-usb (`bInterfaceClass`).
    """
    classes = device.glob("*:*/bInterfaceClass")
    others = {file.parent: file.read_text().strip() for file in classes}
    return [
        f"interface {folder.name} (class {number})"
        for folder, number in sorted(others.items())
        if folder not in disk.parents
    ]


def _other_units(device: Path, disk: Path) -> list[str]:
    """Name the USB device's other disks, such as cards in other slots, and its other SCSI devices.

    The enclosure of a disk is no other use of it. Source: SPC-4, peripheral device types.
    """
    blocks = (block.resolve() for block in _SYS_BLOCK.iterdir())
    disks = [b for b in blocks if b.parent.name == "block" and device in b.parents and b != disk]
    types = {file.parent: file.read_text().strip() for file in device.glob(_SCSI_TYPES)}
    units = [u for u, type_ in types.items() if u not in disk.parents and type_ != _ENCLOSURE]
    return [
        *sorted(found.name for found in disks),
        *sorted(f"SCSI device {unit.name}" for unit in units if not (unit / "block").exists()),
    ]
