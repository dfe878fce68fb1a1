"""USB devices inside the guest, which its kernel simulates: dummy_hcd is host and device in one.

A device is made of functions in configfs (Documentation/usb/gadget_configfs.rst).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from fakes.contract import until
from kernel.witness import BLOCKS, run

_GADGETS: Final = Path("/sys/kernel/config/usb_gadget")
_CONTROLLER: Final = "dummy_udc.0"
SERIAL: Final = "acm.0"
"""Function beside the storage: a serial port."""


@contextmanager
def stick(units: Sequence[Path], others: Sequence[str] = ()) -> Iterator[list[Path]]:
    """Plug a stick with a disk for each of these files, and other functions; pull it afterwards.

    Yield the disks' folders in sysfs, in the order of the files.
    """
    run("modprobe", "-a", "dummy_hcd", "libcomposite", "usb_f_mass_storage", "usb_f_acm", "cdc_acm")
    if not _GADGETS.exists():
        run("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    gadget = _GADGETS / "stick"
    functions = ["mass_storage.0", *others]
    made: list[Path] = []
    try:
        _make(gadget, functions, units, made)
        (gadget / "UDC").write_text(_CONTROLLER)
        until(lambda: len(_disks()) == len(units))
        run("udevadm", "settle")
        yield _disks()
    finally:
        if (gadget / "UDC").exists() and (gadget / "UDC").read_text().strip():
            (gadget / "UDC").write_text("\n")
        until(lambda: _disks() == [])
        for path in reversed(made):
            path.unlink() if path.is_symlink() else path.rmdir()
        run("udevadm", "settle")


def _make(gadget: Path, functions: Sequence[str], units: Sequence[Path], made: list[Path]) -> None:
    """Make the folders and links of the device, and list them as they are made."""
    configuration = gadget / "configs/c.1"
    for folder in (gadget, configuration, *(gadget / "functions" / name for name in functions)):
        folder.mkdir()
        made.append(folder)
    (gadget / "idVendor").write_text("0x1d6b")
    (gadget / "idProduct").write_text("0x0104")
    for number, file in enumerate(units):
        unit = gadget / "functions/mass_storage.0" / f"lun.{number}"
        if number:  # the first is there with the function
            unit.mkdir()
            made.append(unit)
        (unit / "removable").write_text("1")
        (unit / "file").write_text(str(file))
    for name in functions:  # a function that is linked gets no more units
        link = configuration / name
        link.symlink_to(gadget / "functions" / name)
        made.append(link)


def _disks() -> list[Path]:
    """Folders of the stick's disks in sysfs, by their unit's number."""
    disks = [disk for disk in _blocks() if "dummy_hcd" in str(disk) and disk.parent.name == "block"]
    return sorted(disks, key=lambda disk: disk.parents[1].name)


def _blocks() -> Iterator[Path]:
    for block in BLOCKS.glob("sd*"):
        with suppress(FileNotFoundError):  # it is just being removed
            yield block.resolve()
