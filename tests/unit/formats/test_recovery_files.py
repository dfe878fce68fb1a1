from __future__ import annotations

import base64
import contextlib
import os
import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.formats import recovery_files
from caam_hotplug.kernel import memory
from caam_hotplug.keys import store
from caam_hotplug.model import SecretBytes

ID = "0b1f0e5c-7a2b-4f5e-9d51-6f0a4c1d7e93"
ABOUT = recovery_files.About("cartridge-01", "capi:tk(cbc(aes))-plain", 512, "ext4", ID)
KEY = bytes(range(1, 17))

keys = st.sampled_from([16, 32]).flatmap(
    lambda size: st.lists(st.integers(1, 255), min_size=size, max_size=size).map(bytes)
)


def written(key: bytes = KEY, about: recovery_files.About = ABOUT) -> bytearray:
    """A recovery file's content."""
    head = recovery_files.head(about, "the.recovery", len(key))
    content = bytearray(len(head) + recovery_files.key_line_length(len(key)))
    content[: len(head)] = head
    recovery_files.write_key_line(SecretBytes(bytearray(key)), content, len(head))
    return content


def key_in(content: bytes) -> bytes:
    room = SecretBytes(bytearray(recovery_files.KEY_MAX_BYTES))
    return bytes(room.buffer[: recovery_files.read_key(bytearray(content), room)])


@given(keys)
def test_a_written_file_is_read_again_and_its_key_is_base64(key: bytes) -> None:
    content = written(key)
    assert recovery_files.read_about(content) == ABOUT
    assert key_in(content) == key
    assert content.endswith(b"\nkey = " + base64.b64encode(key) + b"\n")


def test_the_file_has_the_command_that_opens_the_medium_on_a_pc() -> None:
    about = recovery_files.About("archive", "capi:tk(cbc(aes))-plain64", 4096, "ext4", ID)
    assert (
        "sed -n 's/^key = //p' the.recovery | base64 -d | cryptsetup open --type plain "
        "--cipher aes-cbc-plain64 --key-size 256 --hash plain --sector-size 4096 --key-file - "
        "/dev/disk/by-partlabel/archive archive"
    ) in written(KEY * 2, about).decode()


def test_the_files_name_is_quoted_in_the_command() -> None:
    assert "'my key; rm -rf x'" in recovery_files.command(ABOUT, "my key; rm -rf x", 16)


@pytest.mark.parametrize(
    ("cipher", "plain"),
    [
        ("capi:tk(cbc(aes))-plain", "aes-cbc-plain"),
        ("capi:tk(cbc(aes))-plain64", "aes-cbc-plain64"),
        ("capi:tk(cbc(aes))-essiv:sha256", "aes-cbc-essiv:sha256"),
        ("aes-xts-plain64", "aes-xts-plain64"),
        ("capi:cbc(aes)-plain", None),
    ],
)
def test_a_cipher_has_the_one_that_a_pc_knows_unless_it_is_a_drivers_own(
    cipher: str, plain: str | None
) -> None:
    assert recovery_files.plain_cipher(cipher) == plain


def test_a_file_that_went_through_windows_is_read() -> None:
    content = bytearray(bytes(written()).replace(b"\n", b"\r\n"))
    assert recovery_files.read_about(content) == recovery_files.read_about(bytearray(written()))
    assert key_in(bytes(content)) == KEY


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda text: text.replace(b"key = ", b"kez = "), "it has no key"),
        (lambda text: text.replace(b"key = A", b"key = *"), "not base64"),
        (lambda text: text[:-5] + b"\n", "it has 15 bytes, not 16, 32 or 64"),
        (lambda text: text[:-1] + b"=\nAAAA", None),
        (lambda text: text[:-3] + b"A" * 80, "not base64"),
        (lambda text: text[:-25] + base64.b64encode(bytes(16)) + b"\n", "has a zero byte"),
    ],
)
def test_a_damaged_key_is_reported_without_any_part(damage: object, words: str | None) -> None:
    content = damage(bytes(written()))  # type: ignore[operator]
    if words is None:
        assert key_in(content) == KEY
        return
    with pytest.raises(recovery_files.RecoveryFileError, match=words) as refused:
        key_in(content)
    assert base64.b64encode(KEY).decode()[:6] not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "lacks label"),
        (b"label = x\n", "lacks label, cipher"),
        (b"\x00\xff\n", "no `name = value`"),
        (
            b"label = ../x\ncipher = c\nsector-size = 512\nfilesystem = ext4\nid = x\n",
            "its label cannot",
        ),
        (b"label = x\ncipher = c\nsector-size = many\nfilesystem = ext4\n", "lacks label"),
    ],
)
def test_a_text_that_is_no_recovery_file_is_refused(text: bytes, words: str) -> None:
    with pytest.raises(recovery_files.RecoveryFileError, match=words):
        recovery_files.read_about(bytearray(text))


@given(st.binary(max_size=400))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    for read in (recovery_files.read_about, lambda b: key_in(bytes(b))):
        with contextlib.suppress(recovery_files.RecoveryFileError):
            read(bytearray(content))


def test_a_recovery_file_is_its_owners_only_and_is_never_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "cartridge-01.recovery"
    store.write_recovery(file, ABOUT, SecretBytes(bytearray(KEY)))
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    content = file.read_bytes()
    with pytest.raises(HotplugError, match="it exists, and is not overwritten"):
        store.write_recovery(file, ABOUT, SecretBytes(bytearray(KEY[::-1])))
    assert file.read_bytes() == content
    with store.recovered(file) as (about, key):
        assert (about, bytes(key.buffer)) == (ABOUT, KEY)
    assert bytes(key.buffer) == bytes(16)


@pytest.mark.parametrize("kind", ["missing", "fifo", "directory", "huge", "empty"])
def test_a_path_that_cannot_be_a_recovery_file_is_not_read(tmp_path: Path, kind: str) -> None:
    file = tmp_path / "file"
    match kind:
        case "fifo":
            os.mkfifo(file)
        case "directory":
            file.mkdir()
        case "huge":
            file.write_bytes(bytes(recovery_files.MAX_BYTES + 1))
        case "empty":
            file.touch()
    with (
        pytest.raises((recovery_files.RecoveryFileError, KernelError), match=str(file)),
        store.recovered(file),
    ):
        pass


def test_a_missing_folder_is_reported(tmp_path: Path) -> None:
    with pytest.raises(KernelError, match=f"open directory {tmp_path}/none: No such file"):
        store.write_recovery(tmp_path / "none" / "file", ABOUT, SecretBytes(bytearray(KEY)))


def test_random_keys_have_no_zero_byte_and_are_overwritten() -> None:
    seen = set()
    for _ in range(64):
        with memory.random_key(32) as key:
            assert 0 not in key.buffer
            seen.add(bytes(key.buffer))
        assert bytes(key.buffer) == bytes(32)
    assert len(seen) == 64


def test_the_memory_of_a_key_is_locked() -> None:
    with memory.locked(16):
        held = next(
            line for line in Path("/proc/self/status").read_text().splitlines() if "VmLck" in line
        )
        assert int(held.split()[1]) > 0
