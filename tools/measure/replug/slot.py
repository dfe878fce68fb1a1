"""Where a medium sits, and how it goes and comes: by software or by a person's hand."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from caam_hotplug.errors import KernelError
from caam_hotplug.model import Bus


@dataclass(frozen=True, slots=True)
class Slot:
    """Where a medium sits, and which text in which file pulls it, or plugs it again."""

    folder: Path
    """In sysfs. All of the medium is below it, each time it comes."""
    pull: tuple[Path, str]
    plug: tuple[Path, str]


def slot_of(disk: Path, bus: Bus) -> Slot | None:
    """Find the slot of the disk at this folder of sysfs; None if software cannot pull the disk.

    Source: `authorized` in Documentation/ABI/testing/sysfs-bus-usb; `delete` and `scan` in
    drivers/scsi/scsi_sysfs.c; `unbind` and `bind` in Documentation/driver-api/driver-model.
    """
    for above in disk.parents:
        driver = (above / "driver").resolve()
        match bus:
            case Bus.USB if (above / "busnum").exists():
                switch = above / "authorized"
                return Slot(above, (switch, "0"), (switch, "1"))
            case Bus.SCSI | Bus.ATA if (above / "delete").exists():
                host, _, place = above.name.partition(":")
                (at,) = (up for up in above.parents if up.name == f"host{host}")
                scan = at / "scsi_host" / at.name / "scan"
                return Slot(above, (above / "delete", "1"), (scan, place.replace(":", " ")))
            case Bus.MMC if (above / "mmc_host").exists() and (driver / "unbind").exists():
                name = above.name
                return Slot(above, (driver / "unbind", name), (driver / "bind", name))
    return None


class Replugger:
    """Pulls and plugs the medium by its slot; without a slot it asks a person to do so."""

    def __init__(self, slot: Slot | None) -> None:
        self.slot = slot
        self.is_out = False
        self.thread = ThreadPoolExecutor(1)
        """A write to sysfs returns late, and the kernel sends its events before."""

    def pull(self) -> None:
        """Pull the medium, or ask for it. Raises: KernelError."""
        self.is_out = True
        try:
            self._do(self.slot.pull if self.slot else None, "pull the medium now")
        except KernelError:
            self.is_out = False
            raise

    def plug(self) -> None:
        """Plug the medium again, or ask for it. Raises: KernelError."""
        self._do(self.slot.plug if self.slot else None, "plug the medium in again")
        self.is_out = False

    def _do(self, what: tuple[Path, str] | None, words: str) -> None:
        if what is None:
            print(words, file=sys.stderr, flush=True)
            return
        file, text = what
        try:
            file.write_text(text)
        except OSError as error:
            hint = "if it is away, pull it and plug it in again"
            raise KernelError(f"write {text!r} to", str(file), error.errno or 0, hint) from error


@contextmanager
def replugger(slot: Slot | None) -> Iterator[Replugger]:
    """Provide what pulls and plugs the medium; on the way out the medium is plugged again."""
    made = Replugger(slot)
    try:
        yield made
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        made.thread.shutdown()  # what has begun has ended
        if made.is_out:
            made.plug()
