"""Power off a disk before it is pulled: stop it, and switch its USB port off."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import scsi
from caam_hotplug.kernel.ctypes_lib import reported_as
from caam_hotplug.model import Volume

log = logging.getLogger(__name__)

_SYS_BLOCK: Final = Path("/sys/class/block")
_FOR_COMMANDS: Final = os.O_RDWR | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
"""At the close udev would read the partitions anew; the kernel refuses that for a held disk."""
_BUILT_IN: Final = {"fixed", "hardwired"}
_SCSI_TYPES: Final = "*:*/host*/target*/*/type"
"""Below a USB device: the type of each of its SCSI devices."""
_ENCLOSURE: Final = "13"


def off(disk: Volume) -> None:
    """Stop the disk and switch its USB port off, as far as they can be.

    The caller holds the disk exclusively. A port stays on for a reader that is built in, and for a
    device that is more than this disk. Raises: KernelError. Blocks for I/O. Source: sd(4), SBC-4;
    Documentation/ABI/testing/sysfs-bus-usb (`remove`).
    """
    try:
        opened = os.open(disk.node, _FOR_COMMANDS)
    except OSError as error:
        if error.errno not in {errno.EROFS, errno.EACCES}:  # a write-protected one is not stopped
            raise KernelError("power off", disk.node, error.errno or 0) from error
    else:
        try:
            scsi.stop(opened)
        except OSError as error:  # no SCSI disk: a card, or a virtual disk
            log.debug("%s cannot be stopped: %s", disk.node, os.strerror(error.errno or 0))
        finally:
            os.close(opened)
    _switch_port_off((_SYS_BLOCK / disk.name).resolve())


@contextmanager
def started(held: int, node: str) -> Iterator[bool]:
    """Start the disk if it was stopped, and stop it again at the end; yield whether it was.

    `held`: a descriptor that holds it exclusively. Raises: OSError. Blocks until the disk runs.
    """
    is_stopped = False
    with suppress(OSError):  # no SCSI disk
        is_stopped = scsi.is_stopped(held)
    if not is_stopped:
        yield False
        return
    opened = os.open(node, _FOR_COMMANDS)
    try:
        scsi.start(opened)
        try:
            yield True
        finally:
            with suppress(OSError):  # it runs on, and what was done meanwhile is done
                scsi.stop(opened)
    finally:
        os.close(opened)


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
