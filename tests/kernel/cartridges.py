"""Removable disks inside the guest, which its kernel makes of memory and gives up when told to.

scsi_debug is the kernel's own simulated SCSI host; every host here has a store of its own, which
outlives its disk, as a medium outlives its being plugged.
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
"""The red key of the blob cartridge-01.bb; so vm/media.py says."""
_DRIVER: Final = Path("/sys/bus/pseudo/drivers/scsi_debug")
_HOSTS: Final = Path("/sys/devices/pseudo_0")


class Cartridge:
    """A medium with one encrypted partition of its own label, and the socket it is plugged into."""

    def __init__(self, adapter: Path, label: str) -> None:
        (self._host,) = adapter.glob("host*")
        self.label = label
        self.contents = b""
        """The partition's bytes as they were made."""

    @property
    def disk(self) -> Path:
        """The disk's folder in sysfs. Raises: ValueError while the medium is out."""
        (block,) = self._host.glob("target*/*/block/*")
        return block

    @property
    def partition(self) -> str:
        """The partition's device node."""
        return f"/dev/{self.disk.name}1"

    @property
    def is_plugged(self) -> bool:
        """Whether the medium is in its socket."""
        return any(self._host.glob("target*/*/block/*"))

    def plug(self) -> None:
        """The medium is in its socket; the kernel tells of it in its own time."""
        (self._host / "scsi_host" / self._host.name / "scan").write_text("0 0 0")

    def settle(self) -> None:
        """The disk is there with its partition, if it has one, and udev knows it.

        The kernel looks at a SCSI disk in a thread of its own (sd_probe in drivers/scsi/sd.c).
        """
        until(lambda: self.is_plugged and Path(f"/dev/{self.disk.name}").exists())
        run("udevadm", "settle")

    @contextmanager
    def disposable(self) -> Iterator[None]:
        """The medium is plugged, known to udev, and may be written to; restored afterwards."""
        self.plug()
        self.settle()
        try:
            yield
        finally:
            run("udevadm", "settle")
            self.restore()
            self.pull()

    def restore(self) -> None:
        """The partition's bytes are those that it was made with."""
        Path(self.partition).write_bytes(self.contents)

    def pull(self) -> None:
        """The kernel has given the disk up, whoever uses it, and has told of that."""
        (self.disk / "device/delete").write_text("1")


@contextmanager
def cartridges(
    labels: Sequence[str],
    filesystems: Sequence[Sequence[str]] = (EXT4,),
    *,
    size_mb: int = 8,
) -> Iterator[list[Cartridge]]:
    """A medium for each label, all out of their sockets; nothing is left of them afterwards.

    Each has the filesystem in its place, the program that makes it; the last one goes on. Within
    others' `with`, they are of the size of the first.
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
        _fill(made, filesystems)
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


def _fill(made: Sequence[Cartridge], filesystems: Sequence[Sequence[str]]) -> None:
    """All are partitioned before any is formatted, since udev's part in it is what takes long."""
    until(lambda: all(c.is_plugged and Path(f"/dev/{c.disk.name}").exists() for c in made))
    run("udevadm", "settle")
    for cartridge in made:
        run("sfdisk", "-q", f"/dev/{cartridge.disk.name}", stdin=_layout(cartridge.label))
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
    """A medium that fails in whatever way device-mapper can make it.

    A file is the medium, a loop device makes a disk of it, a mapping over that is what fails, and a
    second loop device is the disk that the agent sees, with its partition.
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
        """The kernel has the disk and its partition."""
        # Direct, past what the kernel has read of the medium before.
        command = ("losetup", "-f", "-P", "--direct-io=on", "--show")
        device = run(*command, f"/dev/mapper/{self.NAME}").strip()
        try:
            yield
        finally:
            detach(device)

    def becomes(self, target: str) -> None:
        """From now on the medium does what this device-mapper target does."""
        self._reload(self._table(target))

    def fails_from(self, sector: int) -> None:
        """From now on what lies from there on cannot be read or written."""
        good = f"0 {sector} linear {self._below} 0\n" if sector else ""
        self._reload(f"{good}{sector} {self._sectors - sector} error")

    def _reload(self, table: str) -> None:
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)
        run("dmsetup", "reload", self.NAME, stdin=table.encode())
        run("dmsetup", "resume", self.NAME)

    @contextmanager
    def wedged(self) -> Iterator[None]:
        """No read or write of the medium completes, and none fails."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", self.NAME)
        try:
            yield
        finally:
            run("dmsetup", "resume", self.NAME)


def _layout(label: str) -> bytes:
    return f'label: gpt\nstart=2048, name="{label}"\n'.encode()


def _formatted(partition: str, filesystem: Sequence[str]) -> bytes:
    """The partition's bytes with a filesystem under the key, made without CAAM and agent."""
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
