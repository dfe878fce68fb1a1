"""A disk of a board in the guest: `system` beside `recorder`, of which a medium is made."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kernel import witness
from kernel.forked import Stop
from kernel.provisioning import Bench, Done
from kernel.witness import logon_key, run

RECORDER: Final = "recorder"
LINUX: Final = "0FC63DAF-8483-4772-8E79-3D69D8477DE4"
UNFINISHED: Final = "08852176-76A2-4897-9536-C3C5C588DF44"
MAKERS: Final = "4D21B016-B534-45C2-A9FB-5C16E091FD2D"
"""A type that the image's maker has chosen."""
GPT: Final = f"""\
label: gpt
start=2048, size=4096, name=system, type={LINUX}
start=6144, size=6144, name={RECORDER}, type={MAKERS}
start=12288, size=2048, name=other, type={LINUX}
"""
MBR: Final = """\
label: dos
label-id: 0x1234abcd
start=2048, size=4096, type=83
start=6144, size=6144, type=c
start=12288, size=2048, type=5
start=12800, size=1024, type=83
"""
MBR_UUID: Final = "1234abcd-02"
START, LENGTH = 6144 * 512, 6144 * 512


@dataclass(frozen=True, slots=True)
class BoardDisk:
    """The disk, and the command for its partition."""

    bench: Bench
    kind: str

    @property
    def node(self) -> str:
        """The node of the partition that a medium is made of."""
        return f"{self.bench.node}2"

    @property
    def name(self) -> str:
        """The kernel's name of that partition."""
        return self.node.removeprefix("/dev/")

    @property
    def blob(self) -> Path:
        """The blob of the partition."""
        return self.bench.blobs / f"{RECORDER}.bb"

    @property
    def record(self) -> Path:
        """The record of what is not finished."""
        return self.bench.blobs / f".{RECORDER}.bb.provision"

    def provision(self, *more: str, stop: Stop | None = None) -> Done:
        """Run `provision` for the partition, by its label if it has one."""
        device = RECORDER if self.kind == "gpt" else MBR_UUID
        return self.bench.run("provision", device, "--label", RECORDER, *more, stop=stop)

    def entries(self) -> list[dict[str, Any]]:
        """The table, as sfdisk reads it."""
        found: list[dict[str, Any]] = json.loads(run("sfdisk", "-J", self.bench.node))[
            "partitiontable"
        ]["partitions"]
        return found

    def is_made(self, filesystem: str = "ext4") -> None:
        """The partition has a filesystem under the key of its blob; nothing else is left."""
        entry = self.entries()[1]
        if self.kind == "gpt":
            assert (entry["name"], entry["type"]) == (RECORDER, LINUX)
        else:
            assert entry["type"] == "83"
        with logon_key("witness:", witness.import_blob(self.blob.read_bytes()).key) as key:
            table = f"0 {LENGTH // 512} crypt capi:tk(cbc(aes))-plain {key} 0 {self.node} 0"
            run("dmsetup", "create", "witness", "--table", table)
            try:
                found = run("blkid", "-p", "-o", "value", "-s", "TYPE", "/dev/mapper/witness")
            finally:
                run("dmsetup", "remove", "--retry", "witness")
        assert found.strip() == filesystem
        assert self.bench.left() == []
        assert [file.name for file in self.bench.blobs.iterdir()] == [self.blob.name]


@contextmanager
def board_disk(bench: Bench, kind: str) -> Iterator[BoardDisk]:
    """The bench's disk has such a table, and an ext4 on the neighbour."""
    layout = GPT if kind == "gpt" else MBR
    run("sfdisk", "-q", "--wipe=always", bench.node, stdin=layout.encode())
    run("udevadm", "settle")
    run("mkfs.ext4", "-q", f"{bench.node}1")
    run("udevadm", "settle")
    yield BoardDisk(bench, kind)


def others(content: bytes, kind: str) -> bytes:
    """The disk's bytes without those that the partition's making may change."""
    changed = bytearray(content)
    changed[START : START + LENGTH] = bytes(LENGTH)
    for at in changeable(content, kind):
        changed[at] = 0
    return bytes(changed)


def changeable(content: bytes, kind: str) -> set[int]:
    """The places of the partition's entries, and of the checksums."""
    if kind != "gpt":
        return {446 + 16 + 4}
    last = len(content) // 512 - 1
    starts = [1024 + 128, (last - 32) * 512 + 128]
    checksums = [at * 512 + field for at in (1, last) for field in (16, 88)]
    return {n for at in starts for n in range(at, at + 128)} | {
        n for at in checksums for n in range(at, at + 4)
    }


def has_whole_tables(content: bytes) -> bool:
    """Whether both copies of the GPT have their checksums, as UEFI says them to be."""
    last = len(content) // 512 - 1
    for at in (512, last * 512):
        header = bytearray(content[at : at + 92])
        (crc,) = struct.unpack_from("<I", header, 16)
        header[16:20] = bytes(4)
        first, count, each, entries_crc = struct.unpack_from("<QIII", header, 72)
        entries = content[first * 512 : first * 512 + count * each]
        if (zlib.crc32(header), zlib.crc32(entries)) != (crc, entries_crc):
            return False
    return True


@contextmanager
def uevents(disk: str) -> Iterator[list[str]]:
    """What `udevadm monitor` shows of the disk and its partitions, once the context is left."""
    seen: list[str] = []
    names = (each.name for each in Path("/sys/class/block").iterdir())
    other = next(name for name in names if not name.startswith(disk))
    command = ("stdbuf", "-oL", "udevadm", "monitor", "--kernel", "--subsystem-match=block")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as monitor:
        assert monitor.stdout is not None
        for line in monitor.stdout:  # until it listens
            if line.startswith("KERNEL - "):
                break
        try:
            yield seen
            run("udevadm", "settle")
            # An event that is known to come after all others.
            Path(f"/sys/class/block/{other}/uevent").write_text("change")
            for line in monitor.stdout:
                if line.startswith("KERNEL["):
                    action, path = line.split()[1:3]
                    name = os.path.basename(path)
                    if name == other:
                        break
                    if name.startswith(disk):
                        seen.append(f"{action} {name}")
        finally:
            monitor.terminate()
