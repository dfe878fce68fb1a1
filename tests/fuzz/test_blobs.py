"""Any file in a blob's place is a blob of plausible form, or refused with a reason."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Final

from hypothesis import strategies as st

from caam_hotplug import names
from caam_hotplug.errors import BlobError, BlobMissingError, CaamError, HotplugError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blob_files, caam
from fuzz.inputs import INPUT_FILES, KINDS, mutated, put, tries

FOLDER: Final = INPUT_FILES / "blobs"
FOLDER.mkdir()
NAME: Final = "cartridge.bb"
DEVICE: Final = FOLDER / "not-a-caam"
DEVICE.touch()

MAGIC: Final = 0x5461674F
TYPES: Final = (1, 9)
numbers = st.sampled_from([0, 1, 15, 16, 36, 64, 65, 76, 124, 125, 2**31, 2**32 - 1])
any_number = numbers | st.integers(0, 2**32 - 1)
payloads = st.integers(0, 140).map(bytes) | st.binary(max_size=140)


@st.composite
def headed(draw: st.DrawFn) -> bytes:
    """Draw a tag header, valid or with any field wrong, and a payload."""
    payload = draw(payloads)
    fields = [MAGIC, 0, draw(st.sampled_from(TYPES)), draw(st.integers(16, 64)), len(payload)]
    for field in draw(st.sets(st.integers(0, 4), max_size=2)):
        fields[field] = draw(any_number)
    return struct.pack(draw(st.sampled_from(["<5I", ">5I"])), *fields) + payload


GOOD: Final = struct.pack("=5I", MAGIC, 0, 1, 16, 64) + bytes(range(64))
contents = headed() | st.binary(max_size=200) | mutated(st.just(GOOD))


def is_one(content: bytes) -> bool:
    """Whether the bytes have a black blob's form, by the table in blobs.py."""
    if not 20 <= len(content) <= 144:
        return False
    magic, version, kind, red, length = struct.unpack_from("=5I", content)
    whole = length == len(content) - 20 and length >= red + 48
    return (magic, version) == (MAGIC, 0) and kind in TYPES and 16 <= red <= 64 and whole


def read_or_refuse(
    directory: Path, name: str, wanted: blobs.Backend | None = None
) -> blobs.Blob | None:
    """Read the blob; None where it was refused with its path and without its content."""
    try:
        return blob_files.read(directory, name, wanted)
    except BlobError as error:
        path = directory / name
        assert str(error).startswith((f"read blob {path}: ", f"no blob {path}"))
        assert str(error).isprintable()
        assert len(str(error)) < len(str(path)) + 240
        return None


@tries("blob: any content", content=contents)
def test_a_file_is_read_exactly_if_it_has_a_blobs_form(content: bytes) -> None:
    put(FOLDER / NAME, "file", content)
    blob = read_or_refuse(FOLDER, NAME, "tagged")
    assert (blob and blob.content) == (content if is_one(content) else None)


UNDER_MASTER: Final = b"default trusted:kmk 64 " + b"5a" * 113
of_the_kernel = st.binary(max_size=200).map(lambda raw: raw.hex().encode()) | st.just(UNDER_MASTER)
texts = of_the_kernel | of_the_kernel.map(lambda text: text + b"\n") | mutated(of_the_kernel)


@tries("blob: any content, in any form", content=contents | texts | st.binary(max_size=600))
def test_every_blob_that_is_read_is_one_that_the_kernel_takes(content: bytes) -> None:
    put(FOLDER / NAME, "file", content)
    match read_or_refuse(FOLDER, NAME):
        case blobs.Tagged():
            assert is_one(content)
        case blobs.Trusted(content=raw):
            assert 48 < len(raw) <= 512
            assert raw == content or content.strip().lower() == raw.hex().encode()
        case blobs.Encrypted() as blob:
            assert blob.content == content.strip()
            assert blob.content.isascii()
            assert blob.content.count(b" ") == 3
            assert names.why_unsafe(blob.master) is None


@tries("blob: any kind of file, of any size", kind=KINDS, size=any_number)
def test_anything_but_a_file_of_a_blobs_size_is_refused(kind: str, size: int) -> None:
    path = FOLDER / NAME
    put(path, kind, GOOD)
    if kind == "file":
        with path.open("r+b") as file:
            file.truncate(size)
    taken = read_or_refuse(FOLDER, NAME)
    assert taken is None or (kind == "file" and size == len(GOOD))
    put(path, "nothing")


@tries("blob: any name", name=st.text(max_size=12) | st.integers(1, 5000).map(lambda n: "a" * n))
def test_a_name_that_no_template_gives_reads_nothing(name: str) -> None:
    put(FOLDER / NAME, "nothing")
    try:
        blob_files.read(FOLDER, name)
    except (BlobError, BlobMissingError, ValueError) as error:
        assert str(error)
    else:
        raise AssertionError("there is nothing to read")


@tries("blob: any bytes to the CAAM's driver", blob=contents)
def test_no_blob_overflows_the_driver(blob: bytes) -> None:
    try:
        caam.import_blob(DEVICE, blob)
    except CaamError as error:
        assert len(blob) <= blobs.TAGGED_MAX_BYTES
        assert str(error) == f"import blob {DEVICE}: Inappropriate ioctl for device"
    except HotplugError as error:
        assert len(blob) > blobs.TAGGED_MAX_BYTES
        assert "a black blob has at most 144 bytes" in str(error)
