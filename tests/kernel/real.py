"""The real kernel as the contract's world, over a loop device. Runs in the guest, as root."""

from __future__ import annotations

import mmap
import os
import select
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from caam_hotplug.kernel import sysfs
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.kernel.uevents import KERNEL_GROUP, Uevents
from caam_hotplug.model import Bus, DeviceNumber, DevType, Sectors, Volume
from fakes.contract import BLOB, DAMAGED_BLOB, DEADLINE_S, OTHER_BLOB
from kernel import witness
from kernel.witness import Medium, run

KEY: Final = b"sixteen byte key"
"""Red key of the blob cartridge-01.bb, as vm/media.py defines it."""
BLOBS: Final = Path("/data/caam")
RULE: Final = Path("/src/rules/50-caam-hotplug.rules")
_EXT4_MAGIC: Final = b"\x53\xef"
_MAGIC_AT: Final = 1024 + 0x38


class RealWorld:
    """Kernel of this machine, with a medium that has a filesystem under the key of `BLOB`."""

    def __init__(self, medium: Medium, folder: Path) -> None:
        self.volume = volume_at(medium.device)
        blobs, root = folder / "blobs", folder / "media"
        blobs.mkdir()
        root.mkdir()
        for name in (BLOB, OTHER_BLOB):
            (blobs / name).write_bytes((BLOBS / name).read_bytes())
        damaged = bytearray((BLOBS / BLOB).read_bytes())
        damaged[-1] ^= 1
        (blobs / DAMAGED_BLOB).write_bytes(damaged)
        self.kernel = LinuxKernel(blobs, root)
        self.folder = Path(tempfile.mkdtemp(prefix="caam-hotplug-test-", dir="/run"))
        self.folder.chmod(0o755)
        self._mounts = select.poll()
        self._mountinfo = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
        self._mounts.register(self._mountinfo, select.POLLPRI)
        self._uevents = Uevents(KERNEL_GROUP)
        self._changed: set[str] = set()
        self._uevents.mapping_changed = self._changed.add

    def close(self) -> None:
        """Wait for no more changes."""
        self._uevents.close()
        os.close(self._mountinfo)
        self.folder.rmdir()  # empty

    @contextmanager
    def unsafe(self, folder: Path) -> Iterator[None]:
        """Change its mode."""
        folder.chmod(0o777)
        try:
            yield
        finally:
            folder.chmod(0o755)

    def reads_as_written(self, node: str) -> bool:
        """Read past the page cache, which would still have the earlier content."""
        with mmap.mmap(-1, 4096) as page:
            file = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
            try:
                assert os.preadv(file, [page], 0) == len(page)
            finally:
                os.close(file)
            return page[_MAGIC_AT : _MAGIC_AT + 2] == _EXT4_MAGIC

    @contextmanager
    def held(self, node: str) -> Iterator[None]:
        """Hold the device open in this process."""
        file = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
        try:
            yield
        finally:
            os.close(file)

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Hold the mounted directory open in this process."""
        with self.held(str(self.kernel.mount_root / name)):
            yield

    @contextmanager
    def directory(self, name: str, *, content: bool) -> Iterator[None]:
        """Check that the directory remains, with its content."""
        path = self.kernel.mount_root / name
        path.mkdir()
        if content:
            (path / "content").touch()
        try:
            yield
            assert [file.name for file in path.iterdir()] == ["content"] * content
        finally:
            (path / "content").unlink(missing_ok=True)
            path.rmdir()

    @contextmanager
    def foreign_mapping(self) -> Iterator[None]:
        """Make a mapping with dmsetup, which has no DM-UUID."""
        run("dmsetup", "create", "foreign", "--table", "0 8 zero")
        try:
            yield
        finally:
            run("dmsetup", "remove", "--retry", "foreign")

    def changes(self) -> set[str]:
        """Read what the kernel has reported; it does so before a call returns."""
        list(self._uevents.read(1000))
        found = set(self._changed)
        self._changed.clear()
        if any(event & select.POLLPRI for _, event in self._mounts.poll(0)):
            found.add("mounts")
        return found

    def umount(self, name: str, *, lazily: bool = False) -> None:
        """Use the command."""
        run("umount", *(["-l"] if lazily else []), str(self.kernel.mount_root / name))

    def remount(self, name: str, *, read_only: bool, filesystem: bool) -> None:
        """Use the command."""
        options = ["remount", "ro" if read_only else "rw", *([] if filesystem else ["bind"])]
        run("mount", "-o", ",".join(options), str(self.kernel.mount_root / name))

    @contextmanager
    def over_root(self) -> Iterator[None]:
        """Use the commands."""
        root = str(self.kernel.mount_root)
        run("mount", "--bind", root, root)
        try:
            yield
        finally:
            run("umount", root)

    def suspend(self, name: str) -> None:
        """Use the command."""
        run("dmsetup", "suspend", "--noflush", "--nolockfs", name)

    @contextmanager
    def waiting(self, call: Callable[[], object]) -> Iterator[None]:
        """Make the call in a thread: it has a second in which it does not end."""
        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        thread.join(1)
        assert thread.is_alive()
        yield
        thread.join(DEADLINE_S)
        assert not thread.is_alive()

    def load_zeros(self, name: str) -> None:
        """Use the command, for the whole mapping."""
        size = run("dmsetup", "table", name).split()[1]
        run("dmsetup", "reload", name, "--table", f"0 {size} zero")


def volume_at(device: str) -> Volume:
    """Return what sysfs has about a loop device with a medium in it."""
    name = Path(device).name
    which = sysfs.present_id(name)
    assert which is not None
    folder = Path("/sys/class/block") / name
    number = DeviceNumber.from_text((folder / "dev").read_text())
    size = Sectors(int((folder / "size").read_text()))
    return Volume(which, name, number, DevType.DISK, size, Bus.LOOP, True, False)


class Formatted:
    """Medium with an ext4 filesystem under the key, made without the CAAM and the agent."""

    def __init__(self, medium: Medium) -> None:
        self.medium = medium
        with medium.mapped("aes-cbc-plain", KEY.hex()) as node:
            run("mkfs.ext4", "-q", node)
        self._bytes = medium.file.read_bytes()

    def restore(self) -> None:
        """Restore the filesystem as it was made."""
        with self.medium.file.open("r+b") as file:
            file.write(self._bytes)


def left_behind() -> dict[str, object]:
    """List everything that a test or this process could have left."""
    return {
        **witness.left_behind(),
        "open files": sorted(os.listdir("/proc/self/fd")),
        "semaphores, such as udev's cookies": Path("/proc/sysvipc/sem").read_text(),
    }
