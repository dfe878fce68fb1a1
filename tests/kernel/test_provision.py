"""A medium is made, refused, or interrupted at any call and then completed. Runs in the guest."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import disks, mkfs
from fakes.contract import until
from kernel import witness
from kernel.cartridges import Cartridge, cartridges
from kernel.forked import Stop, kill_self
from kernel.provisioning import LABEL, Bench, bench_with
from kernel.witness import Board, attempt, run

CALLS = (
    # the table is tried with a key that nobody keeps
    "ioctl", "dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm remove",
    # the blob
    "mkdir", "fsync", "ioctl", "fsync", "link", "fsync",
    # the mark, after which the blob is settled
    "fdisk_write_disklabel", "unlink", "fsync",
    # the filesystem, under the blob as it is stored
    "dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm resume", "make", "fsync",
    "dm remove",
    # the label
    "fdisk_write_disklabel",
)  # fmt: skip
"""Those that change something, in their order."""
RECOVERY_CALLS = ("fsync", "renameat2", "fsync")
"""With a recovery file, before the blob is made."""


@pytest.fixture(scope="module")
def disk(udev_rule: None) -> Iterator[Cartridge]:
    with cartridges([LABEL]) as (made,):
        made.plug()
        made.settle()
        yield made


@pytest.fixture
def bench(disk: Cartridge, nothing_left: None) -> Iterator[Bench]:
    with bench_with(disk) as made:
        yield made


def numbered(calls: tuple[str, ...]) -> list[object]:
    return [pytest.param(n, id=f"{n}-{call.replace(' ', '-')}") for n, call in enumerate(calls, 1)]


def test_a_blank_medium_is_made_and_nothing_is_left_but_medium_and_blob(bench: Bench) -> None:
    done = bench.provision()
    assert (done.status, done.err) == (0, "note: no rule admits it (built-in: bus is scsi, not usb,"
                                          " mmc); the same command with --rule writes one that "
                                          "does\n")  # fmt: skip
    assert done.out == (f"{bench.medium.partition}: {LABEL} is made; its key is in {bench.blob}\n")
    bench.is_made()
    assert oct(bench.blob.stat().st_mode) == oct(0o100600)
    assert oct(bench.blobs.stat().st_mode) == oct(0o40700)
    assert tuple(done.calls) == CALLS


@pytest.mark.parametrize("call", numbered(CALLS))
def test_killed_after_any_call_the_medium_is_as_it_was_or_has_its_key_and_is_completed(
    bench: Bench, call: int
) -> None:
    before = bench.bytes()
    assert bench.provision(stop=Stop(call, kill_self)).status == -signal.SIGKILL
    changed = bench.bytes() != before
    blob = bench.blob.read_bytes() if bench.blob.exists() else b""
    assert blob or not changed
    done = bench.provision()
    assert (done.status, done.out.endswith(f"{bench.blob}\n")) == (0, True), done.err
    bench.is_made()
    if changed:
        assert bench.blob.read_bytes() == blob


@pytest.mark.parametrize("call", numbered(CALLS[:8] + RECOVERY_CALLS + CALLS[8:15]))
def test_killed_after_any_call_that_makes_its_keys_the_recovery_key_stays_the_mediums(
    bench: Bench, call: int
) -> None:
    file = bench.folder / "recovery"
    first = bench.provision("--recovery-key", str(file), stop=Stop(call, kill_self))
    assert first.status == -signal.SIGKILL
    assert bench.provision("--recovery-key", str(file)).status == 0
    bench.is_made()
    assert opened_on_a_pc(bench, file) == "ext4"
    assert not list(bench.folder.glob(".*"))


@pytest.mark.parametrize("write", range(1, 12))
def test_killed_between_any_two_writes_to_the_table_an_erased_medium_is_completed(
    bench: Bench, write: int
) -> None:
    # Eleven: an old signature, and the five parts of a table twice.
    run("mkfs.ext4", "-q", "-F", bench.node)
    run("udevadm", "settle")
    erase = ("--erase", bench.medium.disk.name)
    command = ("caam-hotplug", "provision", bench.node, "--label", LABEL, *erase)
    killed = traced(bench, f"inject=write:signal=KILL:when={write}", command)
    assert killed.returncode in {-signal.SIGKILL, 137}, killed.stderr
    done = bench.provision(*erase)
    assert done.status == 0, done.err
    bench.is_made()


def traced(bench: Bench, inject: str, command: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    """The command under strace, which acts at its writes to the disk."""
    python = ("python3", "-m", "caam_hotplug.cli", *command[1:], "--config", str(bench.config))
    environment = ("env", "PYTHONPATH=/src/agent", "PYTHONDONTWRITEBYTECODE=1")
    strace = ("strace", "-f", "-qq", "-o", "/dev/null", "-P", bench.node, "-e", "trace=write")
    return attempt(*environment, *strace, "-e", inject, *python)


def opened_on_a_pc(bench: Bench, file: Path) -> str:
    """What cryptsetup finds on the medium with the command that the recovery file has."""
    (command,) = (
        line.removeprefix("#").strip()
        for line in file.read_text().splitlines()
        if "cryptsetup open" in line
    )
    run("bash", "-c", f"set -e -o pipefail; cd {file.parent}; {command}")
    try:
        found = run("blkid", "-p", "-o", "value", "-s", "TYPE", f"/dev/mapper/{LABEL}").strip()
        assert "tk(" not in run("dmsetup", "table", LABEL)
        return found
    finally:
        run("cryptsetup", "close", LABEL)


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
    assert f"rule '{LABEL}' admits it" in explained.out
    again = bench.provision(*options)
    assert (again.status, "was made before" in again.out) == (0, True), again.err
    other = bench.provision("--rule")
    assert (other.status, "says something else" in other.err) == (1, True)


def test_a_medium_that_is_made_is_found_made_and_not_a_byte_is_changed(bench: Bench) -> None:
    assert bench.provision().status == 0
    before = bench.bytes()
    done = bench.provision("--erase", bench.medium.disk.name)
    assert (done.status, "was made before; nothing was erased" in done.out) == (0, True)
    assert bench.bytes() == before


# refusals: nothing is changed


@contextmanager
def unchanged(bench: Bench) -> Iterator[None]:
    """The medium and the folders of the bench are what they were."""

    def files() -> dict[str, tuple[int, bytes]]:
        return {
            str(path): (path.lstat().st_mode, path.read_bytes() if path.is_file() else b"")
            for path in bench.folder.rglob("*")
        }

    run("udevadm", "settle")
    before = bench.bytes(), files()
    yield
    assert (bench.bytes(), files()) == before
    assert bench.left() == []


def refused(bench: Bench, *arguments: str, user: int = 0) -> str:
    """What is said of a command that changes nothing, in one line."""
    with unchanged(bench):
        done = bench.run("provision", *arguments, user=user)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done
    return done.err


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


def test_a_partition_is_refused_and_the_disk_is_named(bench: Bench) -> None:
    said = refused(bench, partitioned(bench), "--label", LABEL)
    assert f"it is a partition; name the whole medium, {bench.node}" in said


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


@pytest.mark.parametrize("content", [b"a letter", b"another", b""])
def test_a_file_in_the_place_of_the_recovery_file_is_not_overwritten(
    bench: Bench, content: bytes
) -> None:
    file = bench.folder / "recovery"
    bench.blobs.mkdir(mode=0o700)
    if content == b"another":
        assert bench.provision("--recovery-key", str(file)).status == 0
        bench.holds(b"")
        bench.blob.unlink()
        options = ("--label", LABEL, "--key-bytes", "32")
    else:
        file.write_bytes(content)
        options = ("--label", LABEL)
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


def test_who_is_not_root_is_refused(bench: Bench) -> None:
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


def test_a_program_that_is_not_installed_is_named_with_its_package() -> None:
    with pytest.raises(HotplugError, match=r"mkfs.btrfs is not installed.*btrfs-progs"):
        mkfs.program("btrfs")


# interrupted, and gone on with


BEGUN = CALLS.index("unlink") + 1


def test_a_medium_that_was_begun_goes_on_only_with_the_same_options(bench: Bench) -> None:
    assert bench.provision(stop=Stop(BEGUN, kill_self)).status == -signal.SIGKILL
    other = refused(bench, bench.node, "--label", LABEL, "--key-bytes", "32")
    assert "it was begun with --key-bytes 16 --seal ecb" in other
    file = str(bench.folder / "recovery")
    late = refused(bench, bench.node, "--label", LABEL, "--recovery-key", file)
    assert f"it was begun without {file}" in late
    assert "it holds a partition table" in refused(bench, bench.node, "--label", "other")
    assert bench.provision().status == 0
    bench.is_made()


def test_a_medium_that_was_begun_and_lost_its_blob_is_begun_anew(bench: Bench) -> None:
    assert bench.provision(stop=Stop(BEGUN, kill_self)).status == -signal.SIGKILL
    bench.blob.unlink()
    assert bench.provision().status == 0
    bench.is_made()


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_program_that_formats_ends_with_the_command(
    bench: Bench, tmp_path: Path, number: signal.Signals
) -> None:
    slow = tmp_path / "mkfs"
    slow.write_text(f"#!/bin/sh\ntouch {tmp_path}/started\nexec sleep 1000\n")
    slow.chmod(0o755)
    run("mount", "--bind", str(slow), "/usr/sbin/mkfs.ext4")
    try:
        with bench.started("provision", bench.node, "--label", LABEL) as process:
            until((tmp_path / "started").exists)
            os.kill(process.pid, number)
            done = process.ended()
    finally:
        run("umount", "/usr/sbin/mkfs.ext4")
    until(lambda: attempt("pgrep", "-x", "sleep").returncode != 0)
    if number == signal.SIGKILL:
        assert done.status == -number
    else:
        assert (done.status, bench.left()) == (1, [])
        assert f"interrupted by {number.name}; the same command goes on" in done.err
    assert bench.provision().status == 0
    bench.is_made()


def test_a_program_that_fails_is_told_with_its_words(bench: Bench, tmp_path: Path) -> None:
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
