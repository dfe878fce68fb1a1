"""Trusted keys that a TPM has sealed, through the agent's bindings; the TPM is swtpm's."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import BlobRejectedError, KeyringError, MasterKeyError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Encrypted, Trusted
from caam_hotplug.kernel import keyring, trusted
from documented import commands
from kernel.witness import PARAMETERS, kernel_log, run

DESCRIPTION = "caam-hotplug:0-0"
STORAGE_KEY = "keyhandle=0x81000001"

pytestmark = [
    pytest.mark.smoke,
    pytest.mark.usefixtures("nothing_left", "tpm"),
]


def power_on(name: str) -> None:
    """Give the board the TPM with this name, after a power cycle."""
    run("board-kernel", "tpm", name)
    assert trusted.is_offered()


def new_board(name: str) -> None:
    """Give the board a new TPM, with a storage key."""
    power_on(name)
    for command in commands("docs/mainline.md", "A board with a TPM"):
        if command.startswith("tpm2_"):
            run("sh", "-c", command)


@pytest.fixture(scope="module")
def boards() -> Iterator[None]:
    """Make the TPMs A and B; restore NXP's board afterwards."""
    chip = (PARAMETERS / "otpmk").read_text().strip()
    new_board("B")
    new_board("A")
    yield
    run("board-kernel", "nxp", chip)


@pytest.fixture
def tpm(boards: None) -> Iterator[None]:
    """Give the board TPM A; unload the test's keys afterwards."""
    yield
    keyring.unlink_key(DESCRIPTION)


def sealed(length: int = 64, options: str = STORAGE_KEY) -> Trusted:
    """Seal a new key, and return its blob as the agent reads it."""
    blob = blobs.parse(trusted.seal_trusted(length, options))
    assert isinstance(blob, Trusted)
    return blob


def load(blob: Trusted, options: str = STORAGE_KEY) -> None:
    trusted.load_trusted(DESCRIPTION, blob, options)
    assert keyring.find_key("trusted", DESCRIPTION) is not None


@pytest.mark.parametrize("length", [32, 64])
def test_a_key_is_sealed_and_loaded_and_its_blob_does_not_show_its_length(length: int) -> None:
    blob = sealed(length)
    assert blob.key_bytes is None
    load(blob)


def test_a_blob_names_its_parent_key() -> None:
    blob = sealed()
    load(blob, "")
    load(blob, "keyhandle=0x81000002")


def test_a_blob_survives_a_power_cycle_and_is_refused_by_another_tpm() -> None:
    blob = sealed()
    power_on("A")
    load(blob)
    keyring.unlink_key(DESCRIPTION)
    power_on("B")
    with pytest.raises(BlobRejectedError, match=r"refused the blob: damaged, sealed by another"):
        load(blob)
    power_on("A")
    load(blob)


def test_a_tpm_that_lost_its_power_too_often_refuses_until_its_lockout_is_cleared() -> None:
    blob = sealed()
    for _ in range(4):
        load_or_not(blob)
        run("systemctl", "stop", "swtpm")
        power_on("A")
    with (
        kernel_log() as lines,
        pytest.raises(BlobRejectedError, match="a TPM may also be locked, and the kernel's log"),
    ):
        load(blob)
    assert any("A TPM error (2337) occurred" in line for line in lines)
    run("tpm2_dictionarylockout", "--clear-lockout")
    load(blob)


def load_or_not(blob: Trusted) -> None:
    try:
        load(blob)
    except BlobRejectedError:
        return
    keyring.unlink_key(DESCRIPTION)


def test_a_changed_blob_is_refused_wherever_it_is_changed() -> None:
    blob = sealed()
    public = blob.content.index(bytes.fromhex("81000001")) + 4
    for at in range(public, len(blob.content), 3):
        changed = bytearray(blob.content)
        changed[at] ^= 0x10
        with pytest.raises(BlobRejectedError, match="the trust source refused the blob: "):
            load(Trusted(bytes(changed)))
    assert keyring.find_key("trusted", DESCRIPTION) is None


@pytest.mark.parametrize(
    "content", [b"\x5f" * 300, b"\x30\x82" + bytes(200)], ids=["noise", "a torn head"]
)
def test_a_blob_that_no_tpm_has_sealed_is_refused(content: bytes) -> None:
    with pytest.raises(BlobRejectedError, match="it has no valid form, or needs other options"):
        load(Trusted(content))


def test_an_error_names_an_option_that_the_tpm_does_not_know_without_its_value() -> None:
    blob = sealed()
    with pytest.raises(BlobRejectedError, match="needs other options") as refused:
        load(blob, "colour=blue")
    assert "blue" not in str(refused.value)


def test_an_error_about_a_wrong_password_does_not_repeat_it() -> None:
    blob = sealed(options=f"{STORAGE_KEY} blobauth=swordfish")
    load(blob, "blobauth=swordfish")
    with pytest.raises(
        BlobRejectedError, match=r"options are wrong, such as .* password"
    ) as refused:
        load(blob, "blobauth=herring")
    assert "herring" not in str(refused.value)
    run("tpm2_dictionarylockout", "--clear-lockout")


@pytest.mark.parametrize(
    ("options", "number", "words"),
    [
        (
            "",
            errno.EINVAL,
            "a TPM needs options, such as keyhandle=0x81000001; of the CAAM a job has",
        ),
        ("keyhandle=blue", errno.EINVAL, "the trust source knows no such options"),
        ("keyhandle=0x81000002", errno.EPERM, "its options are wrong, such as a key handle"),
    ],
)
def test_options_that_make_no_key_are_an_error(options: str, number: int, words: str) -> None:
    with pytest.raises(KeyringError, match=words) as refused:
        trusted.seal_trusted(64, options)
    assert refused.value.errno == number


def test_a_length_that_no_trusted_key_has_is_an_error() -> None:
    with pytest.raises(KeyringError, match="a trusted key has 32 to 128 bytes"):
        trusted.seal_trusted(16, STORAGE_KEY)


def test_a_tpm_master_encrypts_keys_and_a_master_of_another_tpm_has_its_own_error() -> None:
    master = sealed()
    blob = blobs.parse(trusted.seal_encrypted(64, master, "master", STORAGE_KEY))
    assert isinstance(blob, Encrypted)
    trusted.load_encrypted(DESCRIPTION, blob, master, STORAGE_KEY)
    assert keyring.find_key("encrypted", DESCRIPTION) is not None
    keyring.unlink_key(DESCRIPTION)
    power_on("B")
    with pytest.raises(MasterKeyError, match=r"the master key master .* sealed by another chip"):
        trusted.load_encrypted(DESCRIPTION, blob, master, STORAGE_KEY)
    power_on("A")


def test_a_board_without_its_tpm_has_no_trusted_keys() -> None:
    blob = sealed()
    run("systemctl", "stop", "swtpm")
    with pytest.raises(KeyringError, match="and the source's hardware") as refused:
        load(blob)
    assert refused.value.errno == errno.ENODEV
    power_on("A")
    assert Path("/dev/tpm0").exists()
    load(blob)
