"""A medium is made as it was asked for, or refused and then not changed. Runs in the guest."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import disks, mkfs
from kernel import witness
from kernel.cartridges import KEY
from kernel.provisioning import CALLS, LABEL, TRIED, Bench, opened_on_a_pc, refused, unchanged
from kernel.real import BLOBS
from kernel.witness import Board, run


def test_a_blank_medium_is_made_and_nothing_is_left_but_medium_and_blob(bench: Bench) -> None:
    done = bench.provision()
    assert (done.status, done.err) == (
        0,
        "note: no rule matches it (built-in: bus is scsi, not usb, mmc); the same command with "
        "--rule writes one that does\n",
    )
    assert done.out == f"{bench.medium.partition}: {LABEL} is made; its key is in {bench.blob}\n"
    bench.is_made()
    assert oct(bench.blob.stat().st_mode) == oct(0o100600)
    assert oct(bench.blobs.stat().st_mode) == oct(0o40700)
    assert tuple(done.calls) == CALLS


def test_a_dry_run_checks_everything_and_changes_nothing(bench: Bench) -> None:
    run("mkfs.ext4", "-q", "-F", bench.node)
    file, erase = bench.folder / "recovery", ("--erase", bench.medium.disk.name)
    options = ("--recovery-key", str(file), "--rule", "--dry-run")
    said = refused(bench, bench.node, "--label", LABEL, *options)
    assert "it holds ext4 (a filesystem, or a header)" in said
    with unchanged(bench):
        done = bench.provision(*options, *erase)
    assert (done.status, tuple(done.calls)) == (0, TRIED), done.err
    heading, *steps, end = done.out.splitlines()
    assert heading == f"{bench.node}: {LABEL} would be made in these steps:"
    assert f"- make a key of 16 bytes, and write it to {file}" in steps
    assert f"- seal the key as a tagged key, and write {bench.blob}" in steps
    assert f"- erase {bench.node}, which holds ext4 (a filesystem, or a header)" in steps
    assert f"- write the rule to {bench.folder}/rules.d/{LABEL}.toml" in steps
    assert end == "nothing was changed"
    assert bench.provision(*erase).status == 0
    bench.is_made()


CHOICES = {
    "4096": (("--sector-size", "4096"), {"sector_size": 4096}),
    "plain64": (
        ("--cipher", "capi:tk(cbc(aes))-plain64", "--key-bytes", "32", "--seal", "ccm"),
        {"cipher": "capi:tk(cbc(aes))-plain64"},
    ),
    "vfat": (("--fs", "vfat"), {"filesystem": "vfat"}),
    "exfat": (("--fs", "exfat"), {"filesystem": "exfat"}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_is_what_the_medium_has_then(bench: Bench, choice: str) -> None:
    options, wanted = CHOICES[choice]
    file = bench.folder / "recovery"
    done = bench.provision(*options, "--recovery-key", str(file))
    assert done.status == 0, done.err
    bench.is_made(**wanted)  # type: ignore[arg-type]
    assert opened_on_a_pc(bench, file) == wanted.get("filesystem", "ext4")


def test_a_rule_is_written_once_and_says_what_the_medium_has(bench: Bench) -> None:
    options = ("--rule", "--sector-size", "4096")
    done = bench.provision(*options)
    assert done.status == 0, done.err
    rule = bench.folder / "rules.d" / f"{LABEL}.toml"
    assert "sector_size = 4096" in rule.read_text()
    assert "the built-in one no longer applies" in done.err
    assert rule.stat().st_mode == 0o100644
    explained = bench.run("explain", bench.medium.partition)
    assert f"rule '{LABEL}' matches it" in explained.out
    again = bench.provision(*options)
    assert (again.status, "was made before" in again.out) == (0, True), again.err
    other = bench.provision("--rule")
    assert (other.status, "says something else" in other.err) == (1, True)


def test_a_medium_that_is_made_is_not_taken_for_one_of_other_options(bench: Bench) -> None:
    assert bench.provision().status == 0
    file = str(bench.folder / "recovery")
    said = refused(bench, bench.node, "--label", LABEL, "--recovery-key", file)
    assert f"it was made before, {file} is not there, and a blob does not tell its key" in said
    said = refused(bench, bench.node, "--label", LABEL, "--key-bytes", "32", "--seal", "ccm")
    assert "it was made with --backend tagged --key-bytes 16 --seal ecb, not with" in said


def test_a_medium_that_is_made_is_found_made_and_not_a_byte_is_changed(bench: Bench) -> None:
    assert bench.provision().status == 0
    before = bench.bytes()
    done = bench.provision("--erase", bench.medium.disk.name)
    assert (done.status, "was made before; nothing was erased" in done.out) == (0, True)
    assert bench.bytes() == before


# refusals: nothing is changed


CONTENTS = {
    "a filesystem": (("mkfs.ext4", "-q", "-F"), "it holds ext4 (a filesystem, or a header)"),
    "swap space": (("mkswap", "-q"), "it holds swap (a filesystem, or a header)"),
    "a LUKS header": (
        ("cryptsetup", "luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2",
         "--pbkdf-force-iterations", "1000", "--luks2-metadata-size", "64k",
         "--luks2-keyslots-size", "512k", "--key-file", "/etc/hostname"),
        "it holds crypto_LUKS (a filesystem, or a header)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("content", CONTENTS)
def test_a_medium_that_holds_something_is_erased_only_by_its_name(
    bench: Bench, content: str
) -> None:
    program, words = CONTENTS[content]
    run(*program, bench.node)
    name = bench.medium.disk.name
    assert f"{words}; if all of it may be lost, say so with --erase {name}" in refused(
        bench, bench.node, "--label", LABEL
    )
    assert f"--erase names sdzz, and this is {name}; nothing was erased" in refused(
        bench, bench.node, "--label", LABEL, "--erase", "sdzz"
    )
    done = bench.provision("--erase", name)
    assert done.status == 0, done.err
    bench.is_made()
    # As a medium of another label it holds something, too, and its own blob is never replaced.
    assert "it holds a partition table (gpt)" in refused(bench, bench.node, "--label", "other")


WHOLE = """
[[rule]]
name = "archives"
match.devtype = "disk"
match.bus = "scsi"
key.blob = "archive.bb"
mount.name = "archive"
"""


def test_a_whole_disk_of_this_board_is_erased_only_by_its_name(bench: Bench) -> None:
    bench.blobs.mkdir(mode=0o700)
    blob = bench.blobs / "archive.bb"
    blob.write_bytes((BLOBS / "cartridge-01.bb").read_bytes())
    bench.config.write_text(bench.config.read_text() + WHOLE)
    sectors = run("blockdev", "--getsz", bench.node).strip()
    table = f"0 {sectors} crypt aes-cbc-plain {KEY.hex()} 0 {bench.node} 0"
    run("dmsetup", "create", "whole", "--table", table)
    try:
        run("mkfs.ext4", "-q", "/dev/mapper/whole")
        options = (bench.node, "--label", LABEL)
        erase = ("--erase", bench.medium.disk.name)
        assert "it is in use: mapping whole lies on it" in refused(bench, *options, *erase)
    finally:
        run("dmsetup", "remove", "--retry", "whole")
    words = (
        f"provision {bench.node}: it holds the volume of rule 'archives': ext4 (a filesystem, or a "
        f"header), under the key of {blob}; if all of it may be lost, say so with --erase"
    )
    assert words in refused(bench, *options)
    assert words in refused(bench, *options, "--dry-run")
    blob.unlink()
    assert "it holds something that no program here knows, at byte" in refused(bench, *options)
    assert bench.provision(*erase).status == 0
    bench.is_made()


def test_noise_on_a_medium_is_erased_only_by_its_name(bench: Bench) -> None:
    bench.holds(bytes(3 << 20) + os.urandom(1 << 20))
    said = refused(bench, bench.node, "--label", LABEL)
    assert "it holds something that no program here knows, at byte 31" in said
    assert bench.provision("--erase", bench.medium.disk.name).status == 0
    bench.is_made()


def partitioned(bench: Bench) -> str:
    """The disk has a partition with a filesystem; the partition's node."""
    run("sfdisk", "-q", bench.node, stdin=b"label: gpt\nstart=2048\n")
    run("udevadm", "settle")
    run("mkfs.ext4", "-q", bench.medium.partition)
    return bench.medium.partition


@pytest.mark.parametrize("point", ["/mnt", "/boot"])
def test_a_medium_that_is_mounted_is_refused_and_so_is_the_systems_own(
    bench: Bench, point: str
) -> None:
    partition = partitioned(bench)
    Path(point).mkdir(exist_ok=True)
    run("mount", "-o", "ro", partition, point)
    try:
        said = refused(bench, bench.node, "--label", LABEL, "--erase", bench.medium.disk.name)
    finally:
        run("umount", point)
    own = "it is the system's own disk: /boot lies on it"
    assert (own if point == "/boot" else "it is in use: mounted at /mnt") in said


def test_a_medium_under_a_mapping_is_refused(bench: Bench) -> None:
    partition = partitioned(bench)
    run("dmsetup", "create", "others", "--table", f"0 8 linear {partition} 0")
    try:
        said = refused(bench, bench.node, "--label", LABEL, "--erase", bench.medium.disk.name)
    finally:
        run("dmsetup", "remove", "--retry", "others")
    assert "it is in use: mapping others lies on it" in said


def test_a_write_protected_medium_is_refused(bench: Bench) -> None:
    run("blockdev", "--setro", bench.node)
    try:
        assert "the medium is write-protected" in refused(bench, bench.node, "--label", LABEL)
    finally:
        run("blockdev", "--setrw", bench.node)


def test_a_medium_that_another_program_has_locked_is_refused(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disks, "_PATIENCE_S", 0.5)
    file = os.open(bench.node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        said = refused(bench, bench.node, "--label", LABEL)
    finally:
        os.close(file)
    assert "another program has locked it for 0.5 s" in said


def test_a_blob_of_the_label_is_never_replaced(bench: Bench) -> None:
    bench.blobs.mkdir(mode=0o700)
    bench.blob.write_bytes(b"whatever it is")
    said = refused(bench, bench.node, "--label", LABEL)
    assert f"{bench.blob} exists, and whatever was encrypted with it would be lost" in said


@pytest.mark.parametrize("content", [b"a letter", b"another", b"of a medium that is made", b""])
def test_a_file_in_the_place_of_the_recovery_file_is_not_overwritten(
    bench: Bench, content: bytes
) -> None:
    file = bench.folder / "recovery"
    bench.blobs.mkdir(mode=0o700)
    options = ("--label", LABEL)
    if content in {b"another", b"of a medium that is made"}:
        assert bench.provision("--recovery-key", str(file)).status == 0
        bench.holds(b"")
        bench.blob.unlink()
        if content == b"another":
            options += ("--key-bytes", "32")
    else:
        file.write_bytes(content)
    said = refused(bench, bench.node, *options, "--recovery-key", str(file))
    assert str(file) in said


BAD = {
    "label": (("--label", "../x"), "it starts with '.'"),
    "cipher": (("--label", LABEL, "--cipher", "capi:tk(xts(aes))-plain"), "load table of mapping"),
    "plain cipher": (("--label", LABEL, "--cipher", "aes-cbc-plain"), "load table of mapping"),
    "size": (("--label", LABEL, "--fs", "xfs"), "xfs needs 302 MiB at least"),
    "recovery": (
        ("--label", LABEL, "--cipher", "aes-xts-plain64", "--recovery-key", "/run/bench/r"),
        "a recovery key opens media of tagged keys",
    ),
    "folder": (("--label", LABEL, "--recovery-key", "/run/bench/none/r"), "No such file"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_changes_nothing(bench: Bench, bad: str) -> None:
    bench.blobs.mkdir(mode=0o700)
    options, words = BAD[bad]
    assert words in refused(bench, bench.node, *options)


def test_a_blob_directory_that_others_may_write_to_is_refused(bench: Bench) -> None:
    bench.blobs.mkdir()
    bench.blobs.chmod(0o777)
    assert "can be written by others" in refused(bench, bench.node, "--label", LABEL)


def test_users_other_than_root_are_refused(bench: Bench) -> None:
    said = refused(bench, bench.node, "--label", LABEL, user=65534)
    assert said.endswith(f"provision {bench.node}: it needs to be root; use sudo\n")


def test_a_board_without_the_driver_changes_nothing(bench: Bench) -> None:
    board = Board()
    board.power_off()
    try:
        said = refused(bench, bench.node, "--label", LABEL)
    finally:
        board.restore()
    assert "is the kernel's caam_keygen driver there?" in said


def test_a_program_that_is_not_installed_is_named_with_its_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(mkfs, "_FOLDERS", ("/nowhere",))
    with pytest.raises(HotplugError, match=r"mkfs.btrfs is not installed.*btrfs-progs"):
        mkfs.program("btrfs")


# gone on with


def test_a_medium_that_lost_the_first_copy_of_its_table_gets_it_back(bench: Bench) -> None:
    assert bench.provision().status == 0
    whole = bench.bytes()
    bench.holds(whole[:512] + bytes(512) + whole[1024:])
    assert bench.provision().status == 0
    assert bench.bytes() == whole
    bench.is_made()


def test_a_label_under_another_key_counts_as_another_medium(bench: Bench) -> None:
    assert bench.provision().status == 0
    bench.blob.unlink()
    assert bench.run("key", "create", LABEL).status == 0
    assert "it holds a partition table (gpt)" in refused(bench, bench.node, "--label", LABEL)


def test_a_program_that_fails_is_reported_with_its_message(bench: Bench, tmp_path: Path) -> None:
    broken = tmp_path / "mkfs"
    broken.write_text("#!/bin/sh\necho 'no good' >&2\nexit 3\n")
    broken.chmod(0o755)
    run("mount", "--bind", str(broken), "/usr/sbin/mkfs.ext4")
    try:
        done = bench.provision()
    finally:
        run("umount", "/usr/sbin/mkfs.ext4")
    assert (done.status, bench.left()) == (1, [])
    assert done.err.endswith("/usr/sbin/mkfs.ext4: no good\n")
    assert bench.provision().status == 0


# keys


def test_a_key_that_is_made_is_the_boards(bench: Bench) -> None:
    done = bench.run("key", "create", "spare", "--key-bytes", "32", "--seal", "ccm")
    assert done.out == f"{bench.blobs}/spare.bb: made; 32 bytes, ccm\n"
    blob = bench.blobs / "spare.bb"
    assert len(witness.import_blob(blob.read_bytes()).key) == 64
    before = blob.read_bytes()
    assert bench.run("key", "create", "spare").status == 1
    assert blob.read_bytes() == before
    listed = json.loads(bench.run("key", "list", "--json").out)
    assert [(key["name"], key["seal"], key["key_bytes"]) for key in listed] == [
        ("spare", "ccm", 32)
    ]


def test_a_second_board_opens_the_medium_with_the_blob_it_has_enrolled(bench: Bench) -> None:
    file = bench.folder / "recovery"
    assert bench.provision("--recovery-key", str(file)).status == 0
    first = bench.blob.read_bytes()
    board = Board()
    board.cold_boot("0f" * 32)
    try:
        bench.blob.unlink()
        done = bench.run("key", "enroll", LABEL, "--from", str(file))
        assert (done.status, done.err) == (0, "")
        bench.is_made()
        assert bench.blob.read_bytes() != first
        again = bench.run("key", "enroll", LABEL, "--from", str(file))
        other = bench.run("key", "enroll", "other", "--from", str(file))
        assert (again.status, other.status) == (1, 1)
        assert f"is the recovery file of {LABEL}" in other.err
    finally:
        board.restore()


def test_no_message_and_no_file_but_the_recovery_file_has_the_key(bench: Bench) -> None:
    file = bench.folder / "recovery"
    done = bench.provision("--recovery-key", str(file))
    (encoded,) = re.findall(r"^key = (.*)$", file.read_text(), re.MULTILINE)
    key = base64.b64decode(encoded)
    shown = done.out + done.err
    assert encoded not in shown
    assert key.hex() not in shown
    for other in bench.blobs.iterdir():
        assert key not in other.read_bytes()
    assert key not in bench.bytes()
