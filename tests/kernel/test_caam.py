"""The CAAM's device through the agent's binding, over the simulated CAAM."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.errors import BlobRejectedError, CaamError, DmError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import blob_files, caam
from caam_hotplug.model import SecretBytes
from caam_hotplug.names import BLOB_DIRECTORY, CAAM_DEVICE
from fakes.contract import BLOB, created, description, found, target
from kernel.real import KEY, RealWorld
from kernel.witness import Board

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("nothing_left")]

FOREIGN = "0f" * 32
MAGIC = bytes.fromhex("4f 67 61 54")


@pytest.fixture
def board() -> Iterator[Board]:
    """Yield the board's CAAM, and restore it."""
    made = Board()
    try:
        yield made
    finally:
        made.restore()


def imported(name: str) -> bytes:
    """Return the tagged key of a blob of this board."""
    blob = blob_files.read(BLOB_DIRECTORY, f"{name}.bb")
    with caam.import_blob(CAAM_DEVICE, blob.content) as key:
        return bytes(key.buffer)


@pytest.mark.parametrize(
    ("name", "length"),
    [
        ("cartridge-01", 20 + 16),
        ("ecb-24", 20 + 32),
        ("ecb-32", 20 + 32),
        ("ecb-64", 20 + 64),
        ("ccm-16", 20 + 16 + 12),
        ("ccm-32", 20 + 32 + 12),
        ("ccm-64", 20 + 64 + 12),
    ],
)
def test_every_kind_of_blob_becomes_a_tagged_key(name: str, length: int) -> None:
    key = imported(name)
    assert (len(key), key[:4]) == (length, MAGIC)


@pytest.mark.parametrize("name", ["cartridge-01", "ecb-24", "ecb-32", "ccm-16", "ccm-32"])
def test_every_key_that_aes_knows_makes_a_mapping(world: RealWorld, name: str) -> None:
    with created(world) as mapping:
        load(world, mapping, name)
        world.kernel.activate_mapping(mapping)
        assert world.reads_as_written(found(world).node) is (name == "cartridge-01")


@pytest.mark.parametrize("name", ["ecb-64", "ccm-64"])
def test_a_key_that_aes_does_not_know_is_refused_with_the_table(
    world: RealWorld, name: str
) -> None:
    with created(world) as mapping:
        with pytest.raises(DmError) as refused:
            load(world, mapping, name)
        assert found(world).table == ()
    assert refused.value.errno == errno.EINVAL


def load(world: RealWorld, mapping: str, name: str, directory: Path = BLOB_DIRECTORY) -> None:
    kernel = world.kernel
    with caam.import_blob(CAAM_DEVICE, blob_files.read(directory, f"{name}.bb").content) as key:
        kernel.add_key(description(world), key)
        line = replace(target(world), key_bytes=len(key)).to_line()
    try:
        kernel.load_table(mapping, line, read_only=False)
    finally:
        kernel.unlink_key(description(world))


@pytest.mark.parametrize(
    ("seal", "size", "length"),
    [("ecb", 16, 36), ("ecb", 32, 52), ("ccm", 16, 48), ("ccm", 32, 64)],
)
def test_a_key_of_every_kind_is_made_and_no_two_are_alike(
    seal: blobs.Seal, size: int, length: int
) -> None:
    first, second = (caam.create_blob(CAAM_DEVICE, seal, size) for _ in range(2))
    assert first != second
    blob = blobs.parse(first)
    assert isinstance(blob, blobs.Tagged)
    assert (blob.seal, blob.key_bytes, blob.blob_bytes) == (seal, size, size + 12 + 48)
    with caam.import_blob(CAAM_DEVICE, first) as key:
        assert len(key) == length


def test_a_key_that_is_given_is_the_one_in_the_blob(world: RealWorld) -> None:
    with SecretBytes(bytearray(KEY)) as given:
        blob = caam.create_blob(CAAM_DEVICE, "ecb", given)
        assert given.buffer == KEY
    assert KEY not in blob
    (world.kernel.blob_directory / "given.bb").write_bytes(blob)
    with created(world) as mapping:
        load(world, mapping, "given", world.kernel.blob_directory)
        world.kernel.activate_mapping(mapping)
        assert world.reads_as_written(found(world).node)


def test_a_key_that_the_driver_does_not_make_is_refused_in_its_words() -> None:
    with pytest.raises(CaamError, match=r"Invalid argument \(Invalid key size: .*\)$") as refused:
        caam.create_blob(CAAM_DEVICE, "ecb", 15)
    assert refused.value.errno == errno.EINVAL


def test_a_blob_of_another_board_is_refused_and_its_own_is_taken_again(board: Board) -> None:
    board.cold_boot(FOREIGN)
    with pytest.raises(BlobRejectedError, match="sealed on another chip") as refused:
        imported("cartridge-01")
    assert isinstance(refused.value.__cause__, OSError)
    assert refused.value.__cause__.errno == errno.EBADMSG
    board.restore()
    assert len(imported("cartridge-01")) == 36


def test_a_blob_of_a_secure_board_is_refused_by_one_that_is_not(board: Board) -> None:
    board.cold_boot(secure=False)
    with pytest.raises(BlobRejectedError, match="another security state"):
        imported("cartridge-01")


def test_bytes_that_are_no_blob_are_refused_for_their_form() -> None:
    with pytest.raises(BlobRejectedError, match="no valid form"):
        caam.import_blob(CAAM_DEVICE, bytes(96))


def test_a_blob_with_any_byte_changed_is_refused(world: RealWorld) -> None:
    blob = world.kernel.read_blob(BLOB).content
    for at in range(len(blob)):
        with pytest.raises(BlobRejectedError):
            caam.import_blob(CAAM_DEVICE, blob[:at] + bytes([blob[at] ^ 1]) + blob[at + 1 :])


def test_a_board_without_the_driver_says_which(board: Board) -> None:
    blob = blob_files.read(BLOB_DIRECTORY, BLOB).content
    board.power_off()
    with pytest.raises(CaamError, match="is the kernel's caam_keygen driver there") as refused:
        caam.import_blob(CAAM_DEVICE, blob)
    assert refused.value.errno == errno.ENOENT


def test_a_device_that_is_another_is_no_caam() -> None:
    blob = blob_files.read(BLOB_DIRECTORY, BLOB).content
    with pytest.raises(CaamError) as refused:
        caam.import_blob(Path("/dev/null"), blob)
    assert refused.value.errno == errno.ENOTTY
