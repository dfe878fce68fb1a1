from __future__ import annotations

import os
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.errors import BlobError, BlobMissingError, UnsafePathError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Encrypted, Tagged, Trusted
from caam_hotplug.kernel import blob_files

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
    """Return a tag header and its blob, as keygen writes them."""
    length = len(payload) if object_bytes is None else object_bytes
    return struct.pack("=5I", magic, version, kind, red_bytes, length) + payload


GOOD = blob_of(payload=bytes(range(64)))
NO_BLOB = (
    "is no blob: neither one of caam-keygen (no tag header), nor what keyctl pipe prints of a "
    "trusted or an encrypted key; a raw one of a trusted key needs backend = 'trusted'"
)


def refusal(directory: Path, name: str = "cartridge.bb") -> str:
    """Return the words of a blob's refusal, without its path."""
    with pytest.raises(BlobError) as caught:
        blob_files.read(directory, name)
    assert not isinstance(caught.value, BlobMissingError)
    return str(caught.value).removeprefix(f"read blob {directory / name}: ")


def test_a_blob_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").write_bytes(GOOD)
    assert blob_files.read(tmp_path, "cartridge.bb") == Tagged(GOOD, 1, "ecb", 16)


@pytest.mark.parametrize(("red_bytes", "overhead"), [(16, 48), (32, 48), (64, 48), (64, 60)])
def test_blobs_of_every_key_size_and_encapsulation_are_taken(
    red_bytes: int, overhead: int, tmp_path: Path
) -> None:
    blob = blob_of(red_bytes=red_bytes, payload=bytes(red_bytes + overhead))
    (tmp_path / "cartridge.bb").write_bytes(blob)
    assert blob_files.read(tmp_path, "cartridge.bb").content == blob


def test_a_blob_that_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BlobMissingError) as caught:
        blob_files.read(tmp_path, "cartridge.bb")
    assert str(caught.value) == f"no blob {tmp_path}/cartridge.bb"


def test_a_blob_whose_directory_is_not_there_is_missing(tmp_path: Path) -> None:
    with pytest.raises(BlobMissingError) as caught:
        blob_files.read(tmp_path / "data" / "caam", "cartridge.bb")
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
    assert refusal(tmp_path) == "has 10000000 bytes, a blob at most 4096"


def test_the_largest_blob_is_taken_and_one_byte_more_is_not(tmp_path: Path) -> None:
    room = blobs.TAGGED_MAX_BYTES - 20
    (tmp_path / "cartridge.bb").write_bytes(blob_of(red_bytes=64, payload=bytes(room)))
    assert len(blob_files.read(tmp_path, "cartridge.bb").content) == blobs.TAGGED_MAX_BYTES
    (tmp_path / "cartridge.bb").write_bytes(blob_of(red_bytes=64, payload=bytes(room + 1)))
    assert refusal(tmp_path) == "has 145 bytes, a black blob at most 144"


TYPES = {
    0: "red key, ECB",
    2: "red blob, ECB",
    3: "black blob, ECB",
    5: "black key, ECB, for trusted descriptors",
    8: "red key, CCM",
    11: "black blob, CCM",
    13: "black key, CCM, for trusted descriptors",
    17: "black key, ECB, in secure memory",
    33: "black key, ECB, of the secure state",
    73: "black key, CCM, of the trusted state",
    129: "black key, ECB, with unknown bits",
}
"""Tag types of no black key that tk(...) takes, and what they are."""


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("wanted", [None, "tagged"])
def test_a_blob_of_another_tag_type_is_refused_with_its_meaning(
    tmp_path: Path, kind: int, wanted: blobs.Backend | None
) -> None:
    (tmp_path / "cartridge.bb").write_bytes(blob_of(kind=kind))
    with pytest.raises(BlobError) as caught:
        blob_files.read(tmp_path, "cartridge.bb", wanted)
    assert str(caught.value) == (
        f"read blob {tmp_path}/cartridge.bb: has tag type {kind}: {TYPES[kind]}; tk(...) needs a "
        "black key, type 1 (ECB) or 9 (CCM)"
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is cut short: 0 bytes, the tag header alone has 20"),
        (GOOD[:19], "is cut short: 19 bytes, the tag header alone has 20"),
        (GOOD[:20], "is cut short or damaged: 20 bytes, the tag header says 84"),
        (GOOD[:-1], "is cut short or damaged: 83 bytes, the tag header says 84"),
        (GOOD + b"\n", "is cut short or damaged: 85 bytes, the tag header says 84"),
        (blob_of(magic=MAGIC + 1), "is not a black blob of caam-keygen (no tag header)"),
        (GOOD[20:], NO_BLOB),
        (b"correct horse battery staple", NO_BLOB),
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
        blob = blob_files.read(directory, "any.bb")
    except BlobError:
        assert not (content.startswith(GOOD[:16]) and 84 <= len(content) <= 144)
    else:
        match blob:
            case Tagged():
                assert blob.content == content
                assert 20 <= len(content) <= blobs.TAGGED_MAX_BYTES
            case Trusted():
                assert content in {blob.content, blob.content.hex().encode()} or content.isspace()
            case Encrypted():
                assert blob.content in content


def test_a_refusal_does_not_show_what_the_file_holds(tmp_path: Path) -> None:
    (tmp_path / "cartridge.bb").write_bytes(b"correct horse battery staple")
    assert "horse" not in refusal(tmp_path)


def test_a_directory_that_others_may_write_to_gives_no_blobs(tmp_path: Path) -> None:
    directory = tmp_path / "caam"
    directory.mkdir()
    (directory / "cartridge.bb").write_bytes(GOOD)
    directory.chmod(0o777)
    with pytest.raises(UnsafePathError, match="can be written by others than root"):
        blob_files.read(directory, "cartridge.bb")


def test_a_blob_that_cannot_be_read_is_refused_with_the_kernels_reason() -> None:
    assert refusal(Path(f"/proc/{os.getpid()}"), "mem") == "Input/output error"


# of the kernel's own key types

SEALED = bytes(range(100, 180))
UNDER_MASTER = b"default trusted:kmk 64 " + b"5a" * (17 + 64 + 32)


def taken(directory: Path, content: bytes, wanted: blobs.Backend | None = None) -> blobs.Blob:
    """Read a file with this content."""
    (directory / "cartridge.bb").write_bytes(content)
    return blob_files.read(directory, "cartridge.bb", wanted)


@pytest.mark.parametrize("content", [SEALED.hex().encode(), SEALED.hex().upper().encode() + b"\n"])
def test_hex_as_keyctl_prints_it_is_a_trusted_keys_blob(content: bytes, tmp_path: Path) -> None:
    blob = taken(tmp_path, content)
    assert blob == Trusted(SEALED)
    assert blob.key_bytes == 32


def test_any_bytes_are_a_trusted_keys_blob_where_the_rule_says_so(tmp_path: Path) -> None:
    tpm = bytes(range(200))
    assert taken(tmp_path, tpm, "trusted") == Trusted(tpm)
    assert Trusted(tpm).key_bytes is None
    assert taken(tmp_path, GOOD[:-1], "trusted") == Trusted(GOOD[:-1])


def test_an_encrypted_keys_text_names_its_master_and_its_length(tmp_path: Path) -> None:
    assert taken(tmp_path, UNDER_MASTER + b"\n") == Encrypted(UNDER_MASTER, "default", "kmk", 64)


@pytest.mark.parametrize(
    ("content", "wanted", "words"),
    [
        (
            SEALED.hex().encode(),
            "tagged",
            "is a trusted key's blob, and the rule asks for 'tagged'",
        ),
        (GOOD, "trusted", "is a tagged key's blob, and the rule asks for 'trusted'"),
        (GOOD, "encrypted", "is a tagged key's blob, and the rule asks for 'encrypted'"),
        (SEALED, None, NO_BLOB),
        (SEALED.hex().encode()[:-1], None, "is cut short: 159 hex digits, half a byte too few"),
        (b"5a" * 48, None, "is cut short or no trusted key's blob: 48 bytes, expected 49 to 512"),
        (b"5a" * 513, None, "is cut short or no trusted key's blob: 513 bytes, expected 49 to 512"),
        (
            UNDER_MASTER[:-1],
            None,
            "is cut short or damaged: expected FORMAT trusted:MASTER LENGTH HEX, with the format "
            "default or enc32, as keyctl pipe prints an encrypted key",
        ),
        (
            UNDER_MASTER.replace(b"trusted:", b"user:"),
            None,
            "is encrypted under user:, and only a trusted key keeps such a key to this board",
        ),
        (
            UNDER_MASTER.replace(b":kmk", b":../kmk"),
            None,
            "names a master '../kmk' that cannot be a file's name: it starts with '.'",
        ),
        (
            UNDER_MASTER.replace(b" 64 ", b" 129 "),
            None,
            "names a key of 129 bytes, expected 20 to 128",
        ),
    ],
)
def test_a_blob_of_the_kernels_that_is_none_is_refused_with_what_is_wrong(
    content: bytes, wanted: blobs.Backend | None, words: str, tmp_path: Path
) -> None:
    with pytest.raises(BlobError) as caught:
        taken(tmp_path, content, wanted)
    assert str(caught.value) == f"read blob {tmp_path}/cartridge.bb: {words}"
