from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.errors import BlobError, BlobMissingError, CaamError, UnsafePathError
from caam_hotplug.kernel import caam
from caam_hotplug.model import SecretBytes

MAGIC = 0x5461674F


def blob_of(
    *,
    magic: int = MAGIC,
    version: int = 0,
    kind: int = 1,
    red_bytes: int = 16,
    object_bytes: int | None = None,
    payload: bytes = bytes(64),
) -> bytes:
    """A tag header and what follows it, as keygen writes them."""
    length = len(payload) if object_bytes is None else object_bytes
    return struct.pack("=5I", magic, version, kind, red_bytes, length) + payload


GOOD = blob_of(payload=bytes(range(64)))


def refusal(directory: Path, name: str = "cartridge.bb") -> str:
    """The words with which a blob is refused, without its path."""
    with pytest.raises(BlobError) as caught:
        caam.read_blob(directory, name)
    assert not isinstance(caught.value, BlobMissingError)
    return str(caught.value).removeprefix(f"read blob {directory / name}: ")


def test_a_blob_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").write_bytes(GOOD)
    assert caam.read_blob(tmp_path, "cartridge.bb") == GOOD


@pytest.mark.parametrize(("red_bytes", "overhead"), [(16, 48), (32, 48), (64, 48), (64, 60)])
def test_blobs_of_every_key_size_and_encapsulation_are_taken(
    red_bytes: int, overhead: int, tmp_path: Path
) -> None:
    blob = blob_of(red_bytes=red_bytes, payload=bytes(red_bytes + overhead))
    (tmp_path / "cartridge.bb").write_bytes(blob)
    assert caam.read_blob(tmp_path, "cartridge.bb") == blob


def test_a_blob_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BlobMissingError) as caught:
        caam.read_blob(tmp_path, "cartridge.bb")
    assert str(caught.value) == f"no blob {tmp_path}/cartridge.bb"


def test_a_blob_whose_directory_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BlobMissingError) as caught:
        caam.read_blob(tmp_path / "data" / "caam", "cartridge.bb")
    assert str(caught.value) == f"no blob {tmp_path}/data/caam/cartridge.bb"


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "cartridge.bb")
    assert refusal(tmp_path) == "is not a regular file"


def test_a_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").mkdir()
    assert refusal(tmp_path) == "is not a regular file"


def test_a_socket_is_refused(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "cartridge.bb"))
        assert refusal(tmp_path) == "No such device or address"


def test_a_link_is_refused_even_if_it_leads_to_a_blob(tmp_path: Path) -> None:
    (tmp_path / "real.bb").write_bytes(GOOD)
    (tmp_path / "cartridge.bb").symlink_to("real.bb")
    assert refusal(tmp_path) == "is a symbolic link"


def test_a_link_that_leads_nowhere_is_a_link_and_not_missing(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").symlink_to("nowhere")
    assert refusal(tmp_path) == "is a symbolic link"


def test_a_file_of_10_megabytes_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "cartridge.bb").open("wb") as file:
        file.write(GOOD)
        file.truncate(10_000_000)
    assert refusal(tmp_path) == "has 10000000 bytes, a black blob at most 144"


def test_the_largest_blob_is_taken_and_one_byte_more_is_not(tmp_path: Path) -> None:
    room = caam.BLOB_MAX_BYTES - 20
    (tmp_path / "cartridge.bb").write_bytes(blob_of(red_bytes=64, payload=bytes(room)))
    assert len(caam.read_blob(tmp_path, "cartridge.bb")) == caam.BLOB_MAX_BYTES
    (tmp_path / "cartridge.bb").write_bytes(blob_of(red_bytes=64, payload=bytes(room + 1)))
    assert refusal(tmp_path) == "has 145 bytes, a black blob at most 144"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is cut short: 0 bytes, the tag header alone has 20"),
        (GOOD[:19], "is cut short: 19 bytes, the tag header alone has 20"),
        (GOOD[:20], "is cut short or damaged: 20 bytes, the tag header says 84"),
        (GOOD[:-1], "is cut short or damaged: 83 bytes, the tag header says 84"),
        (GOOD + b"\n", "is cut short or damaged: 85 bytes, the tag header says 84"),
        (blob_of(magic=MAGIC + 1), "is not a black blob of caam-keygen (no tag header)"),
        (GOOD[20:], "is not a black blob of caam-keygen (no tag header)"),
        (GOOD.hex().encode()[:144], "is not a black blob of caam-keygen (no tag header)"),
        (blob_of(version=1), "is not a black blob of caam-keygen (no tag header)"),
        (blob_of(red_bytes=0), "names a key of 0 bytes; black keys have 16 to 64"),
        (blob_of(red_bytes=15), "names a key of 15 bytes; black keys have 16 to 64"),
        (blob_of(red_bytes=65), "names a key of 65 bytes; black keys have 16 to 64"),
        (
            blob_of(object_bytes=2**32 - 1),
            "is cut short or damaged: 84 bytes, the tag header says 4294967315",
        ),
        (
            blob_of(object_bytes=16)[:36],
            "is a black key, not a blob; caam-keygen writes the blob beside it, as NAME.bb",
        ),
    ],
)
def test_a_file_that_is_no_blob_is_refused_with_what_is_wrong(
    content: bytes, words: str, tmp_path: Path
) -> None:
    (tmp_path / "cartridge.bb").write_bytes(content)
    assert refusal(tmp_path) == words


@given(st.binary(max_size=160) | st.binary(max_size=124).map(lambda p: blob_of(payload=p)))
def test_any_bytes_are_a_blob_of_plausible_form_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    directory = tmp_path_factory.getbasetemp()
    (directory / "any.bb").write_bytes(content)
    try:
        blob = caam.read_blob(directory, "any.bb")
    except BlobError:
        assert not (content.startswith(GOOD[:16]) and 84 <= len(content) <= 144)
    else:
        assert blob == content
        assert 20 <= len(blob) <= caam.BLOB_MAX_BYTES


def test_a_refusal_does_not_show_what_the_file_holds(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").write_bytes(b"correct horse battery staple")
    assert "horse" not in refusal(tmp_path)


def test_a_directory_that_others_may_write_to_gives_no_blobs(tmp_path: Path) -> None:
    directory = tmp_path / "caam"
    directory.mkdir()
    (directory / "cartridge.bb").write_bytes(GOOD)
    directory.chmod(0o777)
    with pytest.raises(UnsafePathError, match="can be written by others than root"):
        caam.read_blob(directory, "cartridge.bb")


def test_a_blob_that_cannot_be_read_is_refused_with_the_kernels_word() -> None:
    assert refusal(Path(f"/proc/{os.getpid()}"), "mem") == "Input/output error"


def test_an_import_without_the_device_says_what_may_be_missing(tmp_path: Path) -> None:
    device = tmp_path / "caam-keygen"
    with pytest.raises(CaamError) as caught:
        caam.import_blob(device, GOOD)
    assert str(caught.value) == (
        f"open {device}: No such file or directory (is the kernel's caam_keygen driver there?)"
    )


def test_an_import_by_a_file_that_is_no_caam_is_refused(tmp_path: Path) -> None:
    device = tmp_path / "caam-keygen"
    device.write_bytes(b"")
    with pytest.raises(CaamError) as caught:
        caam.import_blob(device, GOOD)
    assert str(caught.value) == f"import blob {device}: Inappropriate ioctl for device"


def test_nothing_that_could_overflow_a_kernels_buffer_is_handed_to_the_device(
    tmp_path: Path,
) -> None:
    with pytest.raises(BlobError) as caught:
        caam.import_blob(tmp_path / "never-opened", bytes(caam.BLOB_MAX_BYTES + 1))
    assert str(caught.value) == "a black blob has at most 144 bytes, not 145"


def test_a_key_with_a_zero_byte_is_not_given_to_the_device(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="zero byte"):
        caam.create_blob(tmp_path / "never-opened", "ecb", SecretBytes(bytearray(16)))


def test_a_key_is_not_made_without_the_device(tmp_path: Path) -> None:
    with pytest.raises(CaamError) as caught:
        caam.create_blob(tmp_path / "caam-keygen", "ecb", 16)
    assert "is the kernel's caam_keygen driver there?" in str(caught.value)


def test_a_key_is_not_made_by_a_file_that_is_no_caam(tmp_path: Path) -> None:
    (tmp_path / "caam-keygen").write_bytes(b"")
    with pytest.raises(CaamError, match=r"^create a key with .*: Inappropriate ioctl for device$"):
        caam.create_blob(tmp_path / "caam-keygen", "ecb", 16)
