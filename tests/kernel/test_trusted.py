"""Trusted and encrypted keys of a mainline kernel, through the agent's bindings."""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import BlobRejectedError, KeyringError, MasterKeyError
from caam_hotplug.formats import blobs
from caam_hotplug.formats.blobs import Encrypted, Trusted
from caam_hotplug.kernel import keyring, trusted
from fakes.contract import until
from kernel.witness import PARAMETERS, run
from vm.boards import MASTER, MEDIUM
from vm.sealing import encrypted_blob, trusted_blob

DESCRIPTION = "caam-hotplug:0-0"
FOREIGN = "0f" * 32

pytestmark = [pytest.mark.smoke, pytest.mark.usefixtures("nothing_left")]


@pytest.fixture(scope="module")
def otpmk() -> Iterator[str]:
    """Make the kernel mainline's, and NXP's again afterwards; yield the board's master key."""
    chip = (PARAMETERS / "otpmk").read_text().strip()
    run("board-kernel", "mainline", chip)
    assert trusted.is_offered()  # and loads what it was asked for
    assert trusted.is_offered("encrypted")
    yield chip
    run("board-kernel", "nxp", chip)


@pytest.fixture
def session() -> Iterator[None]:
    """Whatever the test has loaded is in no keyring afterwards."""
    yield
    keyring.unlink_key(DESCRIPTION)


def of(content: bytes) -> blobs.Blob:
    """Read the blob as the agent does."""
    return blobs.parse(content)


def load(content: bytes, master: bytes = b"", description: str = DESCRIPTION) -> None:
    """Load the blob's key into the session keyring."""
    match of(content):
        case Trusted() as blob:
            trusted.load_trusted(description, blob)
        case Encrypted() as blob:
            sealed = of(master)
            assert isinstance(sealed, Trusted)
            trusted.load_encrypted(description, blob, sealed)
        case blobs.Tagged():
            raise AssertionError("a tagged key is loaded by the CAAM's device")


def listed() -> list[str]:
    """Return the lines of /proc/keys for the keys of these tests."""
    lines = Path("/proc/keys").read_text().splitlines()
    return [line for line in lines if DESCRIPTION in line or " master:" in line]


def test_nxps_kernel_has_no_trusted_keys_and_says_what_is_missing(session: None) -> None:
    with pytest.raises(KeyringError, match="the kernel has no trusted keys") as refused:
        load(trusted_blob(MEDIUM, FOREIGN))
    assert refused.value.errno == errno.ENODEV


def test_a_blob_made_outside_is_a_trusted_key_here(otpmk: str, session: None) -> None:
    load(trusted_blob(MEDIUM, otpmk))
    assert keyring.find_key("trusted", DESCRIPTION) is not None
    assert keyring.find_key("logon", DESCRIPTION) is None


def test_a_blob_under_a_master_is_an_encrypted_key_and_its_master_is_gone(
    otpmk: str, session: None
) -> None:
    load(encrypted_blob(MEDIUM, MASTER, "master"), trusted_blob(MASTER, otpmk))
    assert keyring.find_key("encrypted", DESCRIPTION) is not None
    until(lambda: len(listed()) == 1)
    assert " encrypted " in listed()[0]


def test_masters_of_one_name_do_not_disturb_each_other(otpmk: str, session: None) -> None:
    other = bytes(reversed(MASTER))
    first = encrypted_blob(MEDIUM, MASTER, "master"), trusted_blob(MASTER, otpmk)
    second = encrypted_blob(MEDIUM, other, "master"), trusted_blob(other, otpmk)
    faults: list[BaseException] = []

    def again(blob: bytes, master: bytes) -> None:
        description = f"{DESCRIPTION}-{threading.get_ident()}"
        try:
            for _ in range(20):
                load(blob, master, description)
            keyring.unlink_key(description)
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=again, args=pair) for pair in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []


def flipped(content: bytes, at: int) -> bytes:
    """Another hex digit at this place."""
    digit = b"0" if content[at : at + 1] != b"0" else b"1"
    return content[:at] + digit + content[at + 1 :]


def test_a_changed_blob_is_refused_wherever_it_is_changed(otpmk: str, session: None) -> None:
    blob = trusted_blob(MEDIUM, otpmk)
    for at in range(len(blob)):
        with pytest.raises(BlobRejectedError, match="the trust source refused the blob: damaged"):
            load(flipped(blob, at))
    assert keyring.find_key("trusted", DESCRIPTION) is None


def test_a_changed_blob_under_a_master_is_refused(otpmk: str, session: None) -> None:
    blob, master = encrypted_blob(MEDIUM, MASTER, "master"), trusted_blob(MASTER, otpmk)
    for at in range(len(blob) - 226, len(blob), 5):
        with pytest.raises(BlobRejectedError, match=r"under another master key than .* master"):
            load(flipped(blob, at), master)


def test_a_blob_of_another_board_is_refused(otpmk: str, session: None) -> None:
    with pytest.raises(BlobRejectedError, match="sealed on another chip"):
        load(trusted_blob(MEDIUM, FOREIGN))


def test_a_master_of_another_board_is_an_error_of_its_own(otpmk: str, session: None) -> None:
    with pytest.raises(MasterKeyError, match=r"the master key master .*sealed on another chip"):
        load(encrypted_blob(MEDIUM, MASTER, "master"), trusted_blob(MASTER, FOREIGN))
    assert listed() == []


def test_a_blob_of_another_master_and_a_master_of_another_board_are_different_errors(
    otpmk: str, session: None
) -> None:
    blob = encrypted_blob(MEDIUM, bytes(reversed(MASTER)), "master")
    with pytest.raises(BlobRejectedError, match="under another master key than this board's"):
        load(blob, trusted_blob(MASTER, otpmk))


@pytest.mark.parametrize("length", [32, 48, 64, 128])
def test_the_caams_blob_has_the_length_of_its_key(length: int, otpmk: str, session: None) -> None:
    blob = of(trusted_blob(bytes(range(length)), otpmk))
    assert isinstance(blob, Trusted)
    assert blob.key_bytes == length
    trusted.load_trusted(DESCRIPTION, blob)


def test_a_key_that_is_there_already_is_replaced(otpmk: str, session: None) -> None:
    load(trusted_blob(MEDIUM, otpmk))
    first = keyring.find_key("trusted", DESCRIPTION)
    load(encrypted_blob(MEDIUM, MASTER, "master"), trusted_blob(MASTER, otpmk))
    assert first is not None
    assert keyring.find_key("trusted", DESCRIPTION) is None
