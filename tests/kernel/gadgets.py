"""USB devices inside the guest, which its kernel simulates: dummy_hcd is host and device in one.

A device is made of functions in configfs (Documentation/usb/gadget_configfs.rst).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fakes.contract import until
from kernel.witness import BLOCKS, run

_GADGETS: Final = Path("/sys/kernel/config/usb_gadget")
_STICK: Final = _GADGETS / "stick"
_UNIT: Final = _STICK / "functions/mass_storage.0/lun.0"
_CONTROLLER: Final = "dummy_udc.0"
SERIAL: Final = "acm.0"
"""Function beside the storage: a serial port."""
_START: Final = 1 << 20
"""Where a card's partition begins."""


@dataclass(frozen=True, slots=True)
class Card:
    """A card with one partition, whose bytes are in a file."""

    label: str
    file: Path

    @property
    def partition(self) -> bytes:
        """Bytes of the partition."""
        return self.file.read_bytes()[_START:-_START]

    @property
    def outside(self) -> bytes:
        """Bytes before and behind the partition."""
        whole = self.file.read_bytes()
        return whole[:_START] + whole[-_START:]


class Reader:
    """A USB reader, and what can be done to it."""

    def __init__(self, cards: Sequence[Card]) -> None:
        self.cards = cards
        self.card: Card | None = None
        """The card that is in it."""

    @property
    def disk(self) -> Path:
        """Folder of its disk in sysfs. Raises: ValueError while its port is off."""
        (disk,) = _disks()
        return disk

    @property
    def is_on(self) -> bool:
        """Whether its port is on."""
        return bool(_disks())

    def put_in(self, card: Card) -> None:
        """Put a card in, in place of any other; plug the reader again if its port is off."""
        self.take_out()
        (_UNIT / "file").write_text(str(card.file))
        self.card = card
        if not self.is_on:
            (_STICK / "UDC").write_text("\n")
            (_STICK / "UDC").write_text(_CONTROLLER)
            until(lambda: len(_disks()) == 1)

    def take_out(self) -> None:
        """Take the card out, if one is in."""
        (_UNIT / "forced_eject").write_text("1")
        self.card = None


@contextmanager
def reader_with(labels: Sequence[str], contents: bytes) -> Iterator[Reader]:
    """Plug an empty reader, and make a card with a partition of these bytes for each label."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        cards = [_card(Path(folder) / label, label, contents) for label in labels]
        with stick([cards[0].file]):
            made = Reader(cards)
            made.take_out()
            run("udevadm", "settle")
            yield made
            made.take_out()


def _card(file: Path, label: str, contents: bytes) -> Card:
    file.touch()
    os.truncate(file, len(contents) + 2 * _START)
    sectors = len(contents) // 512
    layout = f'label: gpt\nstart={_START // 512}, size={sectors}, name="{label}"\n'
    run("sfdisk", "-q", str(file), stdin=layout.encode())
    with file.open("r+b") as opened:
        opened.seek(_START)
        opened.write(contents)
    return Card(label, file)


@contextmanager
def stick(units: Sequence[Path], others: Sequence[str] = ()) -> Iterator[list[Path]]:
    """Plug a stick with a disk for each of these files, and other functions; pull it afterwards.

    Yield the disks' folders in sysfs, in the order of the files.
    """
    run("modprobe", "-a", "dummy_hcd", "libcomposite", "usb_f_mass_storage", "usb_f_acm", "cdc_acm")
    if not _GADGETS.exists():
        run("mount", "-t", "configfs", "configfs", "/sys/kernel/config")
    gadget = _STICK
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
