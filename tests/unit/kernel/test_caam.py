from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.errors import BlobError, CaamError
from caam_hotplug.formats import blobs
from caam_hotplug.kernel import caam
from caam_hotplug.model import SecretBytes

GOOD = bytes.fromhex("4f67615400000000010000001000000040000000") + bytes(64)


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
        caam.import_blob(tmp_path / "never-opened", bytes(blobs.TAGGED_MAX_BYTES + 1))
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
