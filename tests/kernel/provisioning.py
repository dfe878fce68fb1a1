"""A workbench on which media are made: a disk, a blob directory, a configuration, and the command.

The command runs in a process forked from the tests', as the agent does in `kernel/forked.py`, and
can be killed after each of its calls. Tests read what it has made with the board's own tools.
"""

from __future__ import annotations

import fcntl
import gc
import importlib
import json
import mmap
import os
import pkgutil
import shutil
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import caam_hotplug
from caam_hotplug.cli import main as cli
from caam_hotplug.kernel import devmapper, mkfs
from fakes.contract import until
from kernel import witness
from kernel.cartridges import Cartridge
from kernel.forked import Stop, Watch
from kernel.witness import logon_key, run

BENCH: Final = Path("/run/bench")
LABEL: Final = "cartridge-05"
CIPHER: Final = "capi:tk(cbc(aes))-plain"

_FUNCTIONS: Final = frozenset(
    {"add_key", "keyctl_unlink", "dm_task_run", "renameat2", "fdisk_write_disklabel"}
)
_METHODS: Final = (
    (fcntl, "ioctl"), (os, "mkdir"), (os, "link"), (os, "unlink"), (os, "fsync"), (mkfs, "make"),
    (os, "pwritev"), (os, "fdatasync"),
)  # fmt: skip


TRIED: Final = ("ioctl", "dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm remove")
"""The table is tried with a key that nobody keeps."""
CALLS: Final = (
    *TRIED,
    # the blob
    "mkdir", "fsync", "ioctl", "fsync", "link", "fsync",
    # the mark, after which the blob is settled
    "ioctl", "fdisk_write_disklabel", "unlink", "fsync",
    # the filesystem, under the blob as it is stored
    "dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm resume", "make", "fsync",
    "dm remove",
    # the label
    "ioctl", "fdisk_write_disklabel",
)  # fmt: skip
"""The calls that change something, in their order."""
RECOVERY_CALLS = ("fsync", "link", "fsync")
"""With a recovery file, before the blob is made."""
RECOVERY_SETTLED = ("unlink", "fsync")
"""And after the blob is settled."""


# A command imports what it needs when it is asked for. Each process forked for one would compile
# that anew from its source, which takes seconds in the guest.
for _found in pkgutil.walk_packages(caam_hotplug.__path__, "caam_hotplug."):
    importlib.import_module(_found.name)


@contextmanager
def _measured() -> Iterator[None]:
    """What the command reaches is written to a file of its own, if the tests are measured."""
    if "coverage" not in sys.modules:
        yield
        return
    import coverage

    measured = coverage.Coverage(
        f"/var/tmp/coverage/.coverage.{os.getpid()}",
        branch=True,
        source_pkgs=["caam_hotplug"],
        config_file=False,
    )
    # The package is in the tests' process already, which makes coverage doubt what it measures.
    measured.set_option("run:disable_warnings", ["module-not-measured", "no-data-collected"])
    measured.start()
    try:
        yield
    finally:
        measured.stop()
        measured.save()


@dataclass(frozen=True, slots=True)
class Done:
    """How the command has ended: minus a signal's number if that ended it."""

    status: int
    out: str
    err: str
    calls: list[str]


class Process:
    """The command while it runs."""

    def __init__(self, pid: int, reading: list[int]) -> None:
        self.pid = pid
        self._reading = reading
        self._ended = False

    def ended(self) -> Done:
        """Wait for its end, and for udev."""
        texts = []
        for end in self._reading:
            with open(end, "rb") as file:
                texts.append(file.read().decode())
        self._reading = []
        _, status = os.waitpid(self.pid, 0)
        self._ended = True
        run("udevadm", "settle")
        out, err, calls = texts
        return Done(os.waitstatus_to_exitcode(status), out, err, calls.splitlines())

    def kill(self) -> None:
        """Kill it if it still runs."""
        if not self._ended:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self._ended = True
        for end in self._reading:
            os.close(end)


class Bench:
    """What a test does with the command and its medium."""

    def __init__(self, medium: Cartridge, folder: Path) -> None:
        self.medium = medium
        self.folder = folder
        self.blobs = folder / "blobs"
        self.config = folder / "agent.toml"
        self.config.write_text(f'blob_directory = "{self.blobs}"\nmount_root = "{folder}/media"\n')

    @property
    def node(self) -> str:
        """The disk's device node."""
        return f"/dev/{self.medium.disk.name}"

    @property
    def blob(self) -> Path:
        """The blob of the label that tests use."""
        return self.blobs / f"{LABEL}.bb"

    def holds(self, content: bytes) -> None:
        """The disk begins with these bytes, and has nothing but zeros after them."""
        size = int((self.medium.disk / "size").read_text()) * 512
        with open(self.node, "r+b", buffering=0) as disk:
            disk.write(content.ljust(size, b"\0"))
            os.fsync(disk)
        run("udevadm", "settle")

    def bytes(self) -> bytes:
        """The disk's bytes, past every cache."""
        size = int((self.medium.disk / "size").read_text()) * 512
        file = os.open(self.node, os.O_RDONLY | os.O_DIRECT)
        try:
            with mmap.mmap(-1, size) as room:
                assert os.preadv(file, [room], 0) == size
                return room[:]
        finally:
            os.close(file)

    def provision(self, *more: str, stop: Stop | None = None) -> Done:
        """Run `provision` for the disk and the label."""
        return self.run("provision", self.node, "--label", LABEL, *more, stop=stop)

    def run(self, *arguments: str, stop: Stop | None = None, user: int = 0) -> Done:
        """Run the command, and wait for udev."""
        with self.started(*arguments, stop=stop, user=user) as process:
            return process.ended()

    @contextmanager
    def started(
        self, *arguments: str, stop: Stop | None = None, user: int = 0
    ) -> Iterator[Process]:
        """The command runs, as this user; it is killed on the way out if it still does."""
        ends = [os.pipe() for _ in range(4)]  # output, errors, calls, go
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            os.setresuid(user, user, user)
            writing = [end[1] for end in ends[:3]]
            self._be_the_command(list(arguments), writing, ends[3][0], stop)
        for number, (reading, writing) in enumerate(ends):
            os.close(reading if number == 3 else writing)
        process = Process(pid, [end[0] for end in ends[:3]])
        try:
            yield process
        finally:
            os.close(ends[3][1])
            process.kill()

    def _be_the_command(
        self, arguments: list[str], ends: list[int], go: int, stop: Stop | None
    ) -> None:
        code = 70
        try:
            out, err, calls = ends
            os.dup2(out, 1)
            os.dup2(err, 2)
            sys.settrace(None)
            threading.settrace(None)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115  for good
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            Watch(calls, go, stop, _FUNCTIONS, _METHODS).install()
            if arguments[:2] != ["key", "inspect"]:
                arguments += ["--config", str(self.config)]
            with _measured():
                code = cli.main(arguments)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 71
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def table(self) -> list[dict[str, Any]]:
        """The partitions, as sfdisk reads them off the disk."""
        found = json.loads(run("sfdisk", "-J", self.node))["partitiontable"]
        assert found["label"] == "gpt"
        partitions: list[dict[str, Any]] = found["partitions"]
        return partitions

    def is_made(
        self, *, cipher: str = CIPHER, sector_size: int = 512, filesystem: str = "ext4"
    ) -> None:
        """The medium has its label, and the filesystem under the key of its blob; no trace else."""
        (partition,) = self.table()
        assert partition["name"] == LABEL
        assert partition["type"] == "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
        until(Path(self.medium.partition).exists)
        assert self.filesystem(cipher=cipher, sector_size=sector_size) == filesystem
        assert self.left() == []
        assert [f.name for f in self.blobs.iterdir()] == [self.blob.name]

    def filesystem(self, *, cipher: str = CIPHER, sector_size: int = 512) -> str:
        """What lies on the partition under the key of the blob."""
        partition = self.medium.partition
        sectors = int(run("blockdev", "--getsz", partition))
        with logon_key("witness:", witness.import_blob(self.blob.read_bytes()).key) as key:
            options = f" 1 sector_size:{sector_size}" if sector_size != 512 else ""
            table = f"0 {sectors} crypt {cipher} {key} 0 {partition} 0{options}"
            run("dmsetup", "create", "witness", "--table", table)
            try:
                device = "/dev/mapper/witness"
                return run("blkid", "-p", "-o", "value", "-s", "TYPE", device).strip()
            finally:
                run("dmsetup", "remove", "--retry", "witness")

    def left(self) -> list[str]:
        """Mappings of the command's, and keys, that are still there."""
        mappings = [mapping.name for mapping in devmapper.ours("CAAM-COMMAND-")]
        lines = Path("/proc/keys").read_text().splitlines()
        keys = [line for line in lines if "caam-hotplug" in line and line.split()[2] != "0"]
        return mappings + keys


@contextmanager
def bench_with(medium: Cartridge, folder: Path = BENCH) -> Iterator[Bench]:
    """A bench whose disk is blank; nothing is left on it afterwards."""
    folder.mkdir(mode=0o755)
    try:
        made = Bench(medium, folder)
        made.holds(b"")
        yield made
        made.holds(b"")
        until(lambda: made.left() == [])
    finally:
        for mapping in devmapper.ours("CAAM-COMMAND-"):
            devmapper.remove(mapping.name)
        shutil.rmtree(folder)


def opened_on_a_pc(bench: Bench, file: Path) -> str:
    """What cryptsetup finds on the medium with the command that the recovery file has."""
    (command,) = (
        line.removeprefix("#").strip()
        for line in file.read_text().splitlines()
        if "cryptsetup open" in line
    )
    run("bash", "-c", f"set -e -o pipefail; cd {file.parent}; {command}")
    try:
        found = run("blkid", "-p", "-o", "value", "-s", "TYPE", f"/dev/mapper/{LABEL}").strip()
        assert "tk(" not in run("dmsetup", "table", LABEL)
        return found
    finally:
        run("cryptsetup", "close", LABEL)


@contextmanager
def unchanged(bench: Bench) -> Iterator[None]:
    """The medium and the folders of the bench are what they were."""

    def files() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in bench.folder.rglob("*")
        }

    run("udevadm", "settle")
    before = bench.bytes(), files()
    yield
    assert (bench.bytes(), files()) == before
    assert bench.left() == []


def refused(bench: Bench, *arguments: str, user: int = 0) -> str:
    """Return the one-line message of a command that changes nothing."""
    with unchanged(bench):
        done = bench.run("provision", *arguments, user=user)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done
    return done.err
