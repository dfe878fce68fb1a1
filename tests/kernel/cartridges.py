"""Removable disks inside the guest, which its kernel simulates in memory.

scsi_debug is the kernel's own simulated SCSI host. Every host here has a store of its own, which
outlives its disk, as a medium outlives a removal.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from fakes.contract import until
from kernel.witness import detach, run

EXT4: Final = ("mkfs.ext4", "-q")
HELLO: Final = "hello.txt"
TEXT: Final = b"Encrypted data\n"
KEY: Final = b"sixteen byte key"
"""Red key of the blob cartridge-01.bb, as vm/media.py defines it."""
_DRIVER: Final = Path("/sys/bus/pseudo/drivers/scsi_debug")
_HOSTS: Final = Path("/sys/devices/pseudo_0")


class Cartridge:
    """Medium with one encrypted partition with its own label, and the socket for it."""

    def __init__(self, adapter: Path, label: str) -> None:
        (self._host,) = adapter.glob("host*")
        self.label = label
        self.contents = b""
        """The partition's bytes as they were made."""

    @property
    def disk(self) -> Path:
        """Folder of the disk in sysfs. Raises: ValueError while the medium is out."""
        (block,) = self._host.glob("target*/*/block/*")
        return block

    @property
    def partition(self) -> str:
        """Device node of the partition."""
        return f"/dev/{self.disk.name}1"

    @property
    def is_plugged(self) -> bool:
        """Whether the medium is in its socket."""
        return any(self._host.glob("target*/*/block/*"))

    def plug(self) -> None:
        """Put the medium in its socket; do not wait for the kernel's event."""
        (self._host / "scsi_host" / self._host.name / "scan").write_text("0 0 0")

    def settle(self) -> None:
        """Wait until the disk is there with its partition, if it has one, and known to udev.

        The kernel probes a SCSI disk in a thread of its own (sd_probe in drivers/scsi/sd.c).
        """
        until(lambda: self.is_plugged and Path(f"/dev/{self.disk.name}").exists())
        run("udevadm", "settle")

    @contextmanager
    def disposable(self) -> Iterator[None]:
        """Plug the medium and allow writes to it; restore its content afterwards."""
        self.plug()
        self.settle()
        try:
            yield
        finally:
            run("udevadm", "settle")
            self.restore()
            self.pull()

    def restore(self) -> None:
        """Write the partition's original bytes."""
        Path(self.partition).write_bytes(self.contents)

    def pull(self) -> None:
        """Make the kernel remove the disk, even in use, and wait for its event."""
        (self.disk / "device/delete").write_text("1")


@contextmanager
def cartridges(
    labels: Sequence[str],
    filesystems: Sequence[Sequence[str]] = (EXT4,),
    *,
    size_mb: int = 8,
    sectors: int | None = None,
) -> Iterator[list[Cartridge]]:
    """Make a medium for each label, out of its socket; remove all of them afterwards.

    Each filesystem is given by the command that makes it; the last one is used for the rest. Within
    another call's `with`, media have the size of its media. `sectors`: size of the partition, if
    that is not all of the medium.
    """
    if not _DRIVER.exists():
        options = ("per_host_store=1", "removable=1", "delay=0", "add_host=0")
        run("modprobe", "scsi_debug", *options, f"dev_size_mb={size_mb}")
    others = set(_HOSTS.glob("adapter*"))
    made: list[Cartridge] = []
    try:
        (_DRIVER / "add_host").write_text(str(len(labels)))
        adapters = sorted(set(_HOSTS.glob("adapter*")) - others, key=_number)
        made += [Cartridge(adapter, label) for adapter, label in zip(adapters, labels, strict=True)]
        _fill(made, filesystems, sectors)
        yield made
    finally:
        for cartridge in made:
            if cartridge.is_plugged:
                cartridge.pull()
        run("udevadm", "settle")
        (_DRIVER / "add_host").write_text(str(-len(labels)))
        if not others:
            run("modprobe", "-r", "scsi_debug")


def _number(adapter: Path) -> int:
    return int(adapter.name.removeprefix("adapter"))


def _fill(
    made: Sequence[Cartridge], filesystems: Sequence[Sequence[str]], sectors: int | None
) -> None:
    """Partition all media before formatting any, since udev's part takes the most time."""
    until(lambda: all(c.is_plugged and Path(f"/dev/{c.disk.name}").exists() for c in made))
    run("udevadm", "settle")
    for cartridge in made:
        run("sfdisk", "-q", f"/dev/{cartridge.disk.name}", stdin=_layout(cartridge.label, sectors))
    run("udevadm", "settle")
    contents: dict[Sequence[str], bytes] = {}
    for number, cartridge in enumerate(made):
        program = filesystems[min(number, len(filesystems) - 1)]
        if program not in contents:
            contents[program] = _formatted(cartridge.partition, program)
        cartridge.contents = contents[program]
        cartridge.restore()
        cartridge.pull()


class Faulty:
    """Medium with any fault that device-mapper can simulate.

    A file is the medium, and a loop device makes a disk from it. A mapping over that has the
    fault. A second loop device is the disk that the agent sees, with its partition.
    """

    NAME: Final = "faulty"

    def __init__(self, label: str, contents: bytes) -> None:
        self.label = label
        self._contents = contents
        self._held = ExitStack()
        self._sectors = (len(contents) + (2 << 20)) // 512
        self._below = ""

    def __enter__(self) -> Faulty:
        folder = Path(self._held.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        file = folder / "medium"
        file.touch()
        os.truncate(file, self._sectors * 512)
        run("sfdisk", "-q", str(file), stdin=_layout(self.label))
        with file.open("r+b") as medium:
            medium.seek(1 << 20)
            medium.write(self._contents)
        self._below = run("losetup", "-f", "--show", str(file)).strip()
        self._held.callback(detach, self._below)
        run("dmsetup", "create", self.NAME, "--table", self._table("linear {below} 0"))
        self._held.callback(run, "dmsetup", "remove", "--retry", self.NAME)
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def _table(self, target: str) -> str:
        return f"0 {self._sectors} {target.format(below=self._below)}"

    @contextmanager
    def plugged(self) -> Iterator[None]:
        """Wait until the kernel has the disk and its partition."""
        # Direct, past the medium's pages in the kernel's cache.
        command = ("losetup", "-f", "-P", "--direct-io=on", "--show")
        device = run(*command, f"/dev/mapper/{self.NAME}").strip()
        try:
            yield
        finally:
            detach(device)

    def becomes(self, target: str) -> None:
        """Replace the medium's behaviour by that of this device-mapper target."""
        self._reload(self._table(target))

    def fails_from(self, sector: int) -> None:
        """Make all reads and writes from this sector on fail."""
        good = f"0 {sector} linear {self._below} 0\n" if sector else ""
        self._reload(f"{good}{sector} {self._sectors - sector} error")

    def _reload(self, table: str) -> None:
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)
        run("dmsetup", "reload", self.NAME, stdin=table.encode())
        run("dmsetup", "resume", self.NAME)

    @contextmanager
    def hung(self) -> Iterator[None]:
        """Suspend the medium: no read or write completes, and none fails."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)
        try:
            yield
        finally:
            run("dmsetup", "resume", self.NAME)


def _layout(label: str, sectors: int | None = None) -> bytes:
    size = "" if sectors is None else f"size={sectors}, "
    return f'label: gpt\nstart=2048, {size}name="{label}"\n'.encode()


def _formatted(partition: str, filesystem: Sequence[str]) -> bytes:
    """Return the partition's bytes with a filesystem under the key, made without CAAM and agent."""
    sectors = run("blockdev", "--getsz", partition).strip()
    table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {partition} 0"
    run("dmsetup", "create", "formatting", "--table", table)
    try:
        run(*filesystem, "/dev/mapper/formatting")
        run("mount", "/dev/mapper/formatting", "/mnt")
        Path("/mnt", HELLO).write_bytes(TEXT)
        run("umount", "/mnt")
    finally:
        run("dmsetup", "remove", "--retry", "formatting")
    return Path(partition).read_bytes()
