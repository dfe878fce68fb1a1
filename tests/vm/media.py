"""Makes media on the host, without privileges: GPT, plain dm-crypt, a filesystem with files.

The ciphertext is as dm-crypt writes it. Each 512-byte sector is encrypted separately. Its IV is the
sector's number, little endian, padded with zeros: 32 bits for `plain`, 64 for `plain64`
(dm-crypt.rst).
"""

from __future__ import annotations

import binascii
import functools
import shutil
import struct
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Literal

from cryptography.hazmat.primitives import ciphers
from cryptography.hazmat.primitives.ciphers import algorithms, modes

SECTOR: Final = 512
FIRST_LBA: Final = 2048
LINUX_DATA: Final = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4")

OTPMK_A: Final = "a1" * 32
"""Master key of the board that made the blobs."""
OTPMK_B: Final = "b2" * 32
"""Master key of another board."""

KEYS: Final = {
    "cartridge-01": b"sixteen byte key",
    "ecb-32": b"a key of thirty-two bytes in ecb",
    "ccm-16": b"sixteen in a ccm",
    "ccm-32": b"a key of thirty-two bytes in ccm",
    "ecb-24": b"a twenty-four byte key .",
    "ecb-64": b"a key of sixty-four bytes, which is no key that AES knows of....",
    "ccm-64": b"another key of sixty-four bytes; ccm, and still not one of AES..",
}
"""Keys of the blobs in the saved guest's /data/caam, by their names."""
KEY: Final = KEYS["cartridge-01"]

Filesystem = Literal["ext4", "vfat"]
Cipher = Literal["cbc-plain", "xts-plain64"]
HELLO: Final = {"hello.txt": b"Encrypted data\n"}


def make_medium(
    path: Path,
    partlabel: str = "cartridge-01",
    *,
    key: bytes | None = KEY,
    cipher: Cipher = "cbc-plain",
    files: dict[str, bytes] | None = None,
    filesystem: Filesystem = "ext4",
    size_mib: int = 16,
    total_mib: int = 0,
) -> Path:
    """Make a disk image with one labelled partition; None as key leaves the filesystem unencrypted.

    `total_mib` pads the image: an SD card's size is a power of two, 64 at least.
    """
    contents = tuple((HELLO if files is None else files).items())
    write_disk(path, partlabel, _partition(contents, filesystem, size_mib, key, cipher), total_mib)
    return path


@functools.lru_cache(maxsize=8)
def _partition(
    files: tuple[tuple[str, bytes], ...],
    filesystem: Filesystem,
    size_mib: int,
    key: bytes | None,
    cipher: Cipher,
) -> bytes:
    """Return the partition's bytes; cached, since making them takes half a second."""
    plain = _filesystem(dict(files), filesystem, size_mib)
    return plain if key is None else encrypt(plain, key, cipher)


def write_disk(path: Path, partlabel: str, partition: bytes, total_mib: int = 0) -> None:
    """Write a disk image of one partition with these bytes; the label is any text of 36 units."""
    sectors = FIRST_LBA + len(partition) // SECTOR + FIRST_LBA
    sectors = max(sectors, total_mib * 2**20 // SECTOR)
    with path.open("wb") as disk:
        disk.truncate(sectors * SECTOR)
        for lba, data in _gpt(partlabel, len(partition) // SECTOR, sectors):
            disk.seek(lba * SECTOR)
            disk.write(data)
        disk.seek(FIRST_LBA * SECTOR)
        disk.write(partition)


def encrypt(plain: bytes, key: bytes, cipher: Cipher = "cbc-plain") -> bytes:
    """Return the ciphertext of a volume that starts with sector 0."""
    return b"".join(
        ciphers.Cipher(algorithms.AES(key), mode).encryptor().update(sector)
        for mode, sector in _sectors(plain, cipher)
    )


def decrypt(secret: bytes, key: bytes, cipher: Cipher = "cbc-plain") -> bytes:
    """Return the plain text; the inverse of `encrypt`."""
    return b"".join(
        ciphers.Cipher(algorithms.AES(key), mode).decryptor().update(sector)
        for mode, sector in _sectors(secret, cipher)
    )


def _sectors(text: bytes, cipher: Cipher) -> Iterator[tuple[modes.CBC | modes.XTS, bytes]]:
    """Yield each sector, and the mode for it with its IV."""
    for number in range(len(text) // SECTOR):
        sector = text[number * SECTOR : (number + 1) * SECTOR]
        match cipher:
            case "cbc-plain":
                yield modes.CBC(struct.pack("<I12x", number & 0xFFFFFFFF)), sector
            case "xts-plain64":
                yield modes.XTS(struct.pack("<Q8x", number)), sector


def partition_bytes(path: Path) -> bytes:
    """Return the bytes of the first partition of an image, as they are on the medium."""
    with path.open("rb") as disk:
        disk.seek(2 * SECTOR)
        first, last = struct.unpack_from("<QQ", disk.read(128), 32)
        disk.seek(first * SECTOR)
        return disk.read((last - first + 1) * SECTOR)


def _filesystem(files: dict[str, bytes], kind: Filesystem, size_mib: int) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        tree, plain = Path(scratch) / "tree", Path(scratch) / "plain"
        tree.mkdir()
        for name, data in files.items():
            (tree / name).write_bytes(data)
        with plain.open("wb") as file:
            file.truncate(size_mib << 20)
        match kind:
            case "ext4":
                options = ("-F", "-E", "root_owner=0:0,lazy_itable_init=1", "-d", tree)
                _run("mkfs.ext4", "-q", *options, plain)
            case "vfat":
                _run("mkfs.vfat", plain)
                _run("mcopy", "-i", plain, *tree.iterdir(), "::")
        return plain.read_bytes()


def _run(program: str, *arguments: str | Path) -> None:
    found = shutil.which(program, path="/usr/sbin:/sbin:/usr/bin:/bin") or program
    subprocess.run([found, *map(str, arguments)], check=True, capture_output=True)


def _gpt(label: str, partition_sectors: int, sectors: int) -> list[tuple[int, bytes]]:
    """Return protective MBR, both headers and both tables of entries, as (LBA, bytes)."""
    name = label.encode("utf-16-le", "surrogatepass")
    if len(name) > 72:
        raise ValueError("a GPT label has at most 36 UTF-16 units")
    last = FIRST_LBA + partition_sectors - 1
    entry = struct.pack(
        "<16s16sQQQ72s", LINUX_DATA.bytes_le, uuid.uuid4().bytes_le, FIRST_LBA, last, 0, name
    )
    entries = entry.ljust(128 * 128, b"\0")
    mbr = struct.pack(
        "<446xB3sB3sII48xH", 0, b"\0\2\0", 0xEE, b"\xff\xff\xff", 1, sectors - 1, 0xAA55
    )
    disk = uuid.uuid4().bytes_le

    def header(here: int, other: int, table: int) -> bytes:
        fields = [b"EFI PART", 0x10000, 92, 0, 0, here, other, 34, sectors - 34, disk, table]
        fields += [128, 128, binascii.crc32(entries)]
        form = "<8sIIIIQQQQ16sQIII"
        fields[3] = binascii.crc32(struct.pack(form, *fields))
        return struct.pack(form, *fields).ljust(SECTOR, b"\0")

    return [
        (0, mbr),
        (1, header(1, sectors - 1, 2)),
        (2, entries),
        (sectors - 33, entries),
        (sectors - 1, header(sectors - 1, 1, sectors - 33)),
    ]
