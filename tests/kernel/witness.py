"""The board through its own tools: caam-keygen's ioctls, AF_ALG, keyctl, dmsetup and losetup.

An independent check: nothing here uses the agent's bindings. Runs in the guest, as root.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

KEYGEN: Final = "/dev/caam-keygen"
CREATE: Final = 0xC0384B00
IMPORT: Final = 0xC0384B01
KEY_ROOM: Final = 20 + 64 + 12
BLOB_ROOM: Final = 20 + 64 + 12 + 48
UNTOUCHED: Final = 0xEE
"""Fill byte of a request's buffers, which shows where the driver writes."""
PARAMETERS: Final = Path("/sys/module/caam_sim/parameters")
FOLDER: Final = Path("/data/caam")
"""Folder where caam-keygen keeps keys and blobs."""
BLOCKS: Final = Path("/sys/class/block")
SESSION_KEYRING: Final = -3
SECTOR: Final = 512
RESTING: Final = 2
"""Threads of an agent that does nothing: the loop's, and the one that notices a sleep."""


def run(*argv: str, stdin: bytes = b"") -> str:
    """Run the program and return its output. Raises: AssertionError unless it ended with 0."""
    done = attempt(*argv, stdin=stdin)
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def attempt(*argv: str, stdin: bytes = b"") -> subprocess.CompletedProcess[str]:
    """Run the program to its end, with any exit status."""
    done = subprocess.run(argv, input=stdin, capture_output=True, timeout=120)
    out, err = (text.decode(errors="replace") for text in (done.stdout, done.stderr))
    return subprocess.CompletedProcess(argv, done.returncode, out, err)


def change_the_clock() -> None:
    """Set the clock to what it is, which stands for the resume of a sleep that stops it."""
    time.clock_settime(time.CLOCK_REALTIME, time.time())


@contextmanager
def kernel_log() -> Iterator[list[str]]:
    """Collect the lines that the kernel logs meanwhile; yield the list, filled afterwards.

    Older lines do not count: the log is a ring buffer, which the tests here overflow.
    """
    lines: list[str] = []
    file = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.lseek(file, 0, os.SEEK_END)
        yield lines
        while True:
            try:
                lines.append(os.read(file, 8192).decode(errors="replace"))
            except BrokenPipeError:  # lines were overwritten before they were read
                continue
            except BlockingIOError:
                break
    finally:
        os.close(file)


def left_behind() -> dict[str, object]:
    """List everything that a test may leave, without a program: a spawn is slow in the guest."""
    keys = ctypes.create_string_buffer(4096)
    length = ctypes.CDLL("libkeyutils.so.1").keyctl_read(SESSION_KEYRING, keys, len(keys))
    return {
        "mappings": sorted(_mappings()),
        "loop devices": sorted(map(str, BLOCKS.glob("loop*/loop/backing_file"))),
        "keys": keys.raw[: max(length, 0)],
        "key files": sorted(FOLDER.iterdir()) if FOLDER.exists() else None,
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "chip": [(PARAMETERS / name).read_text() for name in ("otpmk", "secure")],
    }


def _mappings() -> Iterator[str]:
    for file in BLOCKS.glob("dm-*/dm/name"):
        try:
            yield file.read_text()
        except OSError as error:
            # Its removal is under way: dm_attr_show in drivers/md/dm-sysfs.c.
            if error.errno not in (errno.EINVAL, errno.ENOENT, errno.ENODEV):
                raise


class Command(ctypes.Structure):
    """Struct of the ioctl; ctypes lays it out as C does, with padding."""

    _fields_ = [
        ("key_enc_len", ctypes.c_uint8),
        ("key_mode_len", ctypes.c_uint8),
        ("key_value_len", ctypes.c_uint16),
        ("black_key_len", ctypes.c_uint32),
        ("key_enc", ctypes.c_uint64),
        ("key_mode", ctypes.c_uint64),
        ("key_value", ctypes.c_uint64),
        ("black_key", ctypes.c_uint64),
        ("blob_len", ctypes.c_uint32),
        ("blob", ctypes.c_uint64),
    ]


@dataclass(frozen=True, slots=True)
class Answer:
    """Result of an ioctl: errno (0 for success), the lengths, and both complete buffers."""

    errno: int
    key_len: int
    blob_len: int
    key_buffer: bytes
    blob_buffer: bytes

    @property
    def key(self) -> bytes:
        """Return the tagged key. Raises: AssertionError if the ioctl failed."""
        assert self.errno == 0, os.strerror(self.errno)
        return self.key_buffer[: self.key_len]

    @property
    def blob(self) -> bytes:
        """Return the tagged blob. Raises: AssertionError if the ioctl failed."""
        assert self.errno == 0, os.strerror(self.errno)
        return self.blob_buffer[: self.blob_len]

    @property
    def text(self) -> str:
        """Return the driver's message in place of the blob; empty if it wrote none."""
        return written_text(self.blob_buffer)


def written_text(buffer: bytes) -> str:
    """Return the text in a buffer up to its NUL; empty if nothing was written there."""
    text, nul, _ = buffer.partition(b"\0")
    return text.decode() if nul and UNTOUCHED not in text else ""


def create(
    enc: str = "ecb",
    mode: str = "-s",
    value: str | bytes = "16",
    *,
    key_room: int = KEY_ROOM,
    blob_room: int = BLOB_ROOM,
    **fields: int,
) -> Answer:
    """Request a CREATE; `fields` replace fields of the struct."""
    value = value.encode() if isinstance(value, str) else value
    texts = [ctypes.create_string_buffer(text) for text in (enc.encode(), mode.encode(), value)]
    lengths = {
        "key_enc_len": len(enc) + 1,
        "key_mode_len": len(mode) + 1,
        "key_value_len": len(value),
    }
    names = ("key_enc", "key_mode", "key_value")
    pointers = {name: ctypes.addressof(text) for name, text in zip(names, texts, strict=True)}
    return _ask(CREATE, b"", key_room, {**lengths, **pointers, "blob_len": blob_room, **fields})


def import_blob(blob: bytes, /, *, key_room: int = KEY_ROOM, **fields: int) -> Answer:
    """Request an IMPORT; `fields` replace fields of the struct."""
    return _ask(IMPORT, blob, key_room, {"blob_len": len(blob), **fields})


def _ask(request: int, blob: bytes, key_room: int, fields: dict[str, int]) -> Answer:
    key_buffer, blob_buffer = (ctypes.create_string_buffer(256) for _ in range(2))
    ctypes.memset(key_buffer, UNTOUCHED, 256)
    ctypes.memset(blob_buffer, UNTOUCHED, 256)
    ctypes.memmove(blob_buffer, blob, len(blob))
    ours = {
        "black_key_len": key_room,
        "black_key": ctypes.addressof(key_buffer),
        "blob": ctypes.addressof(blob_buffer),
    }
    command = Command(**{**ours, **fields})
    number = ioctl(request, command)
    return Answer(
        number, command.black_key_len, command.blob_len, key_buffer.raw, blob_buffer.raw
    )  # fmt: skip


def ioctl(request: int, argument: Any) -> int:
    """Return the errno of an ioctl on caam-keygen; 0 for success."""
    file = os.open(KEYGEN, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(file, request, argument)
    except OSError as error:
        return error.errno or -1
    finally:
        os.close(file)
    return 0


class Board:
    """The simulated CAAM's module, which is loaded again for another chip or a cold boot."""

    def __init__(self) -> None:
        self.otpmk = (PARAMETERS / "otpmk").read_text().strip()
        self._secure = (PARAMETERS / "secure").read_text().strip()
        self._booted = False

    def cold_boot(self, otpmk: str = "", *, secure: bool = True) -> None:
        """Load a chip with this OTPMK (by default the same), which knows none of its black keys."""
        self.power_off()
        run("modprobe", "caam_sim", f"otpmk={otpmk or self.otpmk}", f"secure={int(secure)}")

    def power_off(self) -> None:
        """Unload the module."""
        self._booted = True
        run("rmmod", "caam_sim")

    def new_session(self, at: str = "now") -> None:
        """Cut the power of the CAAM only: now, or at the resume of the next sleep."""
        (PARAMETERS / "new_session").write_text(at)

    def restore(self) -> None:
        """Load the original chip."""
        if not self._booted:
            return
        if PARAMETERS.exists():
            run("rmmod", "caam_sim")
        run("modprobe", "caam_sim", f"otpmk={self.otpmk}", f"secure={self._secure}")


def crypt(cipher: str, key: bytes, text: bytes, *, decrypt: bool = False, iv: bytes = b"") -> bytes:
    """Run the text through a cipher of the kernel, over AF_ALG. Raises: OSError."""
    operation = socket.ALG_OP_DECRYPT if decrypt else socket.ALG_OP_ENCRYPT
    with algorithm(cipher, key) as transform:
        job, _ = transform.accept()
        with job:
            job.sendmsg_afalg([text], op=operation, **({"iv": iv} if iv else {}))
            return job.recv(len(text))


@contextmanager
def algorithm(cipher: str, key: bytes) -> Iterator[socket.socket]:
    """Return a transform with this key. Raises: OSError from its setkey."""
    with socket.socket(socket.AF_ALG, socket.SOCK_SEQPACKET) as transform:
        transform.bind(("skcipher", cipher))
        transform.setsockopt(socket.SOL_ALG, socket.ALG_SET_KEY, key)
        yield transform


@contextmanager
def logon_key(description: str, payload: bytes) -> Iterator[str]:
    """Add a logon key to the session keyring; yield its spelling in a table."""
    serial = run("keyctl", "padd", "logon", description, "@s", stdin=payload).strip()
    try:
        yield f":{len(payload)}:logon:{description}"
    finally:
        run("keyctl", "unlink", serial, "@s")


@dataclass(frozen=True, slots=True)
class Medium:
    """A file of zeros, and the loop device over it."""

    file: Path
    device: str

    @property
    def sectors(self) -> int:
        """Size of the device in sectors of 512 bytes."""
        return self.file.stat().st_size // SECTOR

    def table(self, cipher: str, key: str) -> str:
        """Return the table of a dm-crypt mapping over the whole medium."""
        return f"0 {self.sectors} crypt {cipher} {key} 0 {self.device} 0"

    @contextmanager
    def mapped(self, cipher: str, key: str) -> Iterator[str]:
        """Map the medium; yield the mapping's device. Raises: AssertionError."""
        name = "witness"
        run("dmsetup", "create", name, "--table", self.table(cipher, key))
        try:
            yield f"/dev/mapper/{name}"
        finally:
            run("dmsetup", "remove", "--retry", name)


@contextmanager
def loop_medium(size_bytes: int) -> Iterator[Medium]:
    """Make a medium of that size; remove it afterwards."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        file = Path(folder) / "medium"
        file.touch()
        os.truncate(file, size_bytes)
        device = run("losetup", "-f", "--show", str(file)).strip()
        try:
            yield Medium(file, device)
        finally:
            detach(device)


def detach(device: str) -> None:
    """Detach the loop device and wait until it has released its file.

    While udevd reads it, this happens only at the last close (loop_clr_fd in drivers/block/loop.c).
    """
    run("losetup", "-d", device)
    run("udevadm", "settle")


def read(device: str, count: int) -> bytes:
    """Return the device's first bytes. Raises: OSError."""
    with open(device, "rb", buffering=0) as file:
        return file.read(count)


def write(device: str, text: bytes) -> None:
    """Write the bytes to the device. Raises: OSError."""
    with open(device, "wb", buffering=0) as file:
        file.write(text)
        os.fsync(file)
