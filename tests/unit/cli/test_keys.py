from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest

from caam_hotplug.cli.main import main
from caam_hotplug.formats import recovery_files
from caam_hotplug.formats.crypt_table import CIPHERS
from caam_hotplug.kernel import caam, memory

MAGIC = 0x5461674F


def blob_of(kind: int, red_bytes: int) -> bytes:
    """A blob's file, as keygen writes it."""
    payload = b"\xa5" * (red_bytes + 48)
    return struct.pack("=5I", MAGIC, 0, kind, red_bytes, len(payload)) + payload


@pytest.fixture
def blobs(roots_folder: Path) -> Path:
    """The blob directory."""
    made = roots_folder / "caam"
    made.mkdir(mode=0o700)
    (roots_folder / "agent.toml").write_text(f'blob_directory = "{made}"\n')
    return made


def status(blobs: Path, *arguments: str) -> int:
    return main(["key", *arguments, "--config", str(blobs.parent / "agent.toml")])


def test_blobs_are_listed_with_what_they_say_of_themselves(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blobs / "cartridge-01.bb").write_bytes(blob_of(1, 16))
    (blobs / "spare.bb").write_bytes(blob_of(9, 32))
    (blobs / ".half.bb.new").write_bytes(b"")
    (blobs / "cartridge-01").write_bytes(b"a black key, which is no blob")
    assert status(blobs, "list") == 0
    assert capsys.readouterr().out.splitlines() == [
        "NAME          TYPE        SEAL  KEY       STATE",
        "cartridge-01  black blob  ecb   16 bytes  ok",
        "spare         black blob  ccm   32 bytes  ok",
    ]
    assert status(blobs, "list", "--json") == 0
    assert json.loads(capsys.readouterr().out)[1] == {
        "name": "spare", "type": "black blob", "seal": "ccm", "key_bytes": 32, "fault": None,
    }  # fmt: skip


def test_a_faulty_blob_is_listed_with_its_fault_and_is_exit_status_1(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blobs / "cut.bb").write_bytes(blob_of(1, 16)[:50])
    (blobs / "\x1b[2J.bb").symlink_to("cut.bb")
    assert status(blobs, "list") == 1
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "'\\x1b[2J'  -     -     -    is a symbolic link" in shown
    assert "is cut short or damaged: 50 bytes, the tag header says 84" in shown
    assert status(blobs, "list", "--json") == 1
    assert json.loads(capsys.readouterr().out)[1]["key_bytes"] is None


@pytest.mark.parametrize("there", [True, False])
def test_a_directory_without_blobs_is_reported(
    blobs: Path, capsys: pytest.CaptureFixture[str], there: bool
) -> None:
    if not there:
        blobs.rmdir()
    assert status(blobs, "list") == 0
    assert capsys.readouterr().out == f"no blobs in {blobs}\n"
    assert blobs.exists() is there


def test_a_blob_is_inspected_without_its_secrets(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = blobs / "spare.bb"
    file.write_bytes(blob_of(9, 32))
    assert main(["key", "inspect", str(file)]) == 0
    shown = capsys.readouterr().out
    assert shown.splitlines() == [
        f"{file}: black blob",
        "  type        9",
        "  seal        ccm",
        "  key_bytes   32",
        "  blob_bytes  80",
    ]
    assert "a5a5" not in shown
    assert main(["key", "inspect", "--json", str(file)]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "file": str(file), "backend": "tagged",
        "type": 9, "seal": "ccm", "key_bytes": 32, "blob_bytes": 80,
    }  # fmt: skip


def test_a_blob_is_inspected_wherever_it_lies(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o777)
    file = tmp_path / "copy.bb"
    file.write_bytes(blob_of(9, 32))
    assert main(["key", "inspect", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: black blob\n")


def test_a_file_that_is_no_blob_cannot_be_inspected(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blobs / "text").write_text("correct horse battery staple")
    assert main(["key", "inspect", str(blobs / "text")]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "no tag header" in shown.err
    assert "horse" not in shown.err


@pytest.mark.parametrize("verb", ["create", "enroll"])
@pytest.mark.parametrize("name", ["", "../x", "a b"])
def test_names_that_rules_do_not_take_are_refused(
    blobs: Path, capsys: pytest.CaptureFixture[str], verb: str, name: str
) -> None:
    more = ["--from", "/dev/null"] if verb == "enroll" else []
    assert status(blobs, verb, name, *more) == 1
    assert capsys.readouterr().err.startswith(f"caam-hotplug: make a key {name!a}: it ")


def test_a_key_is_not_made_in_the_place_of_another(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (blobs / "spare.bb").write_bytes(b"whatever it is")
    assert status(blobs, "create", "spare") == 1
    assert f"{blobs}/spare.bb exists" in capsys.readouterr().err
    assert (blobs / "spare.bb").read_bytes() == b"whatever it is"


def test_without_a_caam_nothing_is_made(blobs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert status(blobs, "create", "spare") == 1
    assert "is the kernel's caam_keygen driver there?" in capsys.readouterr().err
    assert os.listdir(blobs) == []


def test_a_blob_directory_that_others_may_write_to_is_refused(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blobs.chmod(0o777)
    assert status(blobs, "create", "spare") == 1
    assert "can be written by others than root" in capsys.readouterr().err
    assert os.listdir(blobs) == []


@pytest.mark.parametrize(("mode", "owner"), [(0o600, 0), (0o640, 0), (0o604, 0), (0o600, 1000)])
def test_a_recovery_file_that_others_can_read_is_enrolled_with_a_note(
    blobs: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    mode: int,
    owner: int,
) -> None:
    monkeypatch.setattr(caam, "create_blob", lambda *_: blob_of(1, 16))
    monkeypatch.setattr(memory, "refuse_core_dumps", lambda: None)
    about = recovery_files.About("spare", CIPHERS["logon"], 512, "ext4", "an-id")
    file = blobs.parent / "spare.recovery"
    file.write_bytes(
        recovery_files.head(about, file.name, 16) + b"key = MDEyMzQ1Njc4OWFiY2RlZg==\n"
    )
    file.chmod(mode)
    os.chown(file, owner, 0)
    assert status(blobs, "enroll", "spare", "--from", str(file)) == 0
    said = capsys.readouterr().err
    closed = (mode, owner) == (0o600, 0)
    assert said.startswith(f"note: others than root can read {file}") is not closed


@pytest.mark.parametrize("arguments", [[], ["make"], ["create"], ["enroll", "x"], ["inspect"]])
def test_wrong_usage_is_exit_status_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["key", *arguments])
    assert ended.value.code == 2
    assert "usage: caam-hotplug key" in capsys.readouterr().err


def test_a_tagged_key_that_no_cipher_could_use_is_not_made(
    blobs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(blobs, "create", "spare", "--key-bytes", "64") == 1
    assert "a tagged key for AES has 16 or 32" in capsys.readouterr().err
    assert os.listdir(blobs) == []
