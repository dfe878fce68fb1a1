"""Media that go from NXP's keys to mainline's, and all that is on them, whatever happens."""

from __future__ import annotations

import errno
import mmap
import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.kernel import devmapper, trusted
from fakes.contract import until
from kernel import witness
from kernel.cartridges import Cartridge
from kernel.forked import Stop, kill_self
from kernel.provisioning import LABEL, Bench, Done, bench_with, opened_on_a_pc, unchanged
from kernel.test_lost_events import udevd_hanging
from kernel.witness import PARAMETERS, loop_medium, run

DISK: Final = Path("/opt/board")
"""Where a disk of the board's is mounted: the guest's own files would not outlive a power cut."""
RULE: Final = '[[rule]]\nname = "all"\nmatch = { partlabel = "?*" }\n'
JOURNAL: Final = f".{LABEL}.bb.migration"
MASTER: Final = "board"

CUTS: Final = 10
"""Of each of the media that are cut at random."""
MEDIA: Final = 5

READ: Final = ("fsopen", *["fsconfig"] * 4)
"""The filesystem is read, and nothing is written."""
THROUGH_OLD: Final = ("dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm resume")
SEALED: Final = ("add_key", "keyctl_unlink")
"""A new key is sealed and forgotten."""
LOADED: Final = ("dm create", "add_key", "dm load", "keyctl_unlink")
PLANNED: Final = (
    # the medium through its old key
    *THROUGH_OLD, *READ,
    # the new kind of key is tried with one that nobody keeps
    *SEALED, *LOADED, "dm remove",
    "dm remove",
)  # fmt: skip
BEGIN: Final = (
    *PLANNED,
    *THROUGH_OLD, *SEALED, *LOADED, "dm resume",
    # the journal, the mark
    "fsync", "renameat2", "fsync", "fdatasync", "ioctl", "fdisk_write_disklabel",
)  # fmt: skip
PIECE: Final = ("pwritev", "fdatasync", "pwritev", "fdatasync")
"""In the journal as it was, on the medium under the new key."""
PIECES: Final = 6
END: Final = (
    # the last record, that there is no piece any more
    "pwritev", "fdatasync", *READ,
    # the old blob's other name, the new blob
    "renameat2", "fsync", "fsync", "renameat2", "fsync",
    # the label, the journal
    "ioctl", "fdisk_write_disklabel", "unlink", "fsync",
    "dm remove", "dm remove",
)  # fmt: skip
CALLS: Final = BEGIN + PIECES * PIECE + END
"""Those that change something, in their order."""
HALF: Final = len(BEGIN) + 3 * len(PIECE)
UNDER_MASTER: Final = 2
"""Of an encrypted key: how many calls more each sealing, and each loading, takes."""


@pytest.fixture(scope="module")
def both() -> Iterator[None]:
    """The kernel has NXP's keys and mainline's."""
    chip = (PARAMETERS / "otpmk").read_text().strip()
    run("board-kernel", "both", chip)
    assert trusted.is_offered()
    assert trusted.is_offered("encrypted")
    yield
    run("board-kernel", "nxp", chip)


@pytest.fixture(scope="module")
def boards_disk() -> Iterator[Path]:
    """A filesystem on a disk of the board's own."""
    with loop_medium(48 << 20) as medium:
        run("mkfs.ext4", "-q", medium.device)
        DISK.mkdir()
        run("mount", medium.device, str(DISK))
        yield DISK
        run("umount", str(DISK))
        DISK.rmdir()


@pytest.fixture
def bench(both: None, boards_disk: Path, disk: Cartridge, nothing_left: None) -> Iterator[Bench]:
    """A bench with a medium under a tagged key, filled with what is like nothing else."""
    with bench_with(disk, boards_disk / "bench") as made:
        made.config.write_text(f"{made.config.read_text()}{RULE}")
        assert made.provision().status == 0
        with mapped(made) as device:
            filled = random.Random(0).randbytes(4 << 20)
            with open(device, "r+b", buffering=0) as file:
                file.seek(1 << 20)  # the filesystem's own place is before that
                file.write(filled)
                os.fsync(file)
        yield made


@contextmanager
def mapped(bench: Bench, sector_size: int = 512, offset: int = 0) -> Iterator[str]:
    """The partition under the key of its blob, through the board's own tools."""
    partition, blob = bench.medium.partition, bench.blob.read_bytes()
    unit = sector_size // 512
    sectors = (int(run("blockdev", "--getsz", partition)) - offset) // unit * unit
    options = f" 1 sector_size:{sector_size}" if unit > 1 else ""
    with key_of(bench, blob) as cipher_and_key:
        table = f"0 {sectors} crypt {cipher_and_key} 0 {partition} {offset}{options}"
        run("dmsetup", "create", "witness", "--table", table)
    try:
        yield "/dev/mapper/witness"
    finally:
        run("dmsetup", "remove", "--retry", "witness")


@contextmanager
def key_of(bench: Bench, blob: bytes) -> Iterator[str]:
    """The blob's key in the session keyring; yields cipher and key as a table spells them."""
    if blob.startswith(b"OgaT"):
        with witness.logon_key("witness:", witness.import_blob(blob).key) as key:
            yield f"capi:tk(cbc(aes))-plain {key}"
    elif blob.startswith(b"default"):
        master = (bench.blobs / f"{MASTER}.bb").read_bytes()
        with added("trusted", MASTER, master), added("encrypted", "witness", blob):
            yield "aes-xts-plain64 :64:encrypted:witness"
    else:
        with added("trusted", "witness", blob):
            yield "aes-xts-plain64 :64:trusted:witness"


@contextmanager
def added(kind: str, name: str, blob: bytes) -> Iterator[None]:
    serial = run("keyctl", "add", kind, name, f"load {blob.decode()}", "@s").strip()
    try:
        yield
    finally:
        run("keyctl", "unlink", serial, "@s")


def plain(bench: Bench, sector_size: int = 512, offset: int = 0) -> bytes:
    """All that is on the partition, under the key of its blob."""
    with mapped(bench, sector_size, offset) as device:
        return Path(device).read_bytes()


def migrate(bench: Bench, *more: str, to: str = "trusted", stop: Stop | None = None) -> Done:
    """`migrate` of the medium has ended."""
    return bench.run("migrate", LABEL, "--to", to, *more, stop=stop)


def files(bench: Bench) -> set[str]:
    """What the blob directory holds."""
    return {path.name for path in bench.blobs.iterdir()}


def refused(bench: Bench, *arguments: str, user: int = 0) -> str:
    """Return the one-line message of a command that changes nothing."""
    with unchanged(bench):
        done = bench.run("migrate", *arguments, user=user)
    assert (done.status, done.out, done.err.count("\n")) == (1, "", 1), done
    return done.err


def half_moved(bench: Bench) -> None:
    """The medium is marked, and a part of it is under the new key."""
    assert migrate(bench, stop=Stop(HALF, kill_self)).status == -signal.SIGKILL
    (partition,) = bench.table()
    assert partition["name"] == "(caam-hotplug: migrating)"


def test_a_medium_goes_to_a_trusted_key_with_every_byte(bench: Bench) -> None:
    before, table, old = plain(bench), bench.table(), bench.blob.read_bytes()
    done = migrate(bench)
    assert done.status == 0, done.err
    assert tuple(done.calls) == CALLS
    assert done.out == (
        f"{bench.medium.partition}: {LABEL} is under a trusted key; it is in {bench.blob}\n"
        f"its old blob is kept as {bench.blob}.tagged\n"
    )
    assert "moving: 100 % of 6 MB" in done.err
    assert bench.blob.read_bytes() != old
    assert plain(bench) == before
    assert bench.table() == table
    assert files(bench) == {bench.blob.name, f"{bench.blob.name}.tagged"}
    assert (bench.blobs / f"{bench.blob.name}.tagged").read_bytes() == old
    assert bench.left() == []
    with unchanged(bench):
        again = migrate(bench)
    assert (again.status, again.err) == (0, "")
    assert again.out == f"{bench.medium.partition}: {LABEL} has a trusted key already\n"


@pytest.mark.parametrize("by", ["label", "device"])
def test_a_medium_that_udev_has_not_reported_yet_is_found(bench: Bench, by: str) -> None:
    with ExitStack() as held:
        with udevd_hanging():
            bench.medium.pull()
            bench.medium.plug()
            until(lambda: bench.medium.is_plugged and Path(bench.medium.partition).exists())
            name = LABEL if by == "label" else bench.medium.partition
            process = held.enter_context(bench.started("migrate", name, "--to", "tagged"))
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        done = process.ended()
    assert done.out == f"{bench.medium.partition}: {LABEL} has a tagged key already\n", done.err


def test_a_medium_goes_under_the_boards_master_and_back_to_a_tagged_key_each_with_a_recovery_key(
    bench: Bench,
) -> None:
    before, file, other = plain(bench), bench.folder / "recovery", bench.folder / "other"
    to_master = ("--to", "encrypted", "--master", MASTER, "--recovery-key", str(file))
    assert "use the master key board: " in refused(bench, LABEL, *to_master)
    made = bench.run("key", "create", MASTER, "--backend", "trusted", "--key-bytes", "64")
    assert made.status == 0, made.err
    there = bench.run("migrate", bench.medium.partition, *to_master)
    assert there.status == 0, there.err
    assert f"recovery key: {file}; keep it apart" in there.out
    assert bench.blob.read_bytes().startswith(b"default trusted:board 64 ")
    assert plain(bench) == before
    assert opened_on_a_pc(bench, file) == "ext4"
    back = migrate(bench, "--recovery-key", str(other), to="tagged")
    assert back.status == 0, back.err
    assert bench.blob.read_bytes().startswith(b"OgaT")
    assert plain(bench) == before
    assert opened_on_a_pc(bench, other) == "ext4"
    assert not list(bench.folder.glob(".*"))


RECOVERED: Final = (
    len(PLANNED) + 2 * UNDER_MASTER + len(THROUGH_OLD) + len(("fsync", "link", "fsync"))
)
"""The calls after which a recovery file is there, and nothing that relies on it."""
HALF_UNDER_MASTER: Final = HALF + 4 * UNDER_MASTER


def test_killed_with_a_recovery_file_only_the_next_run_uses_its_key_and_later_ones_only_with_it(
    bench: Bench,
) -> None:
    file, other = bench.folder / "recovery", bench.folder / "other"
    with_file = ("--recovery-key", str(file))
    made = bench.run("key", "create", MASTER, "--backend", "trusted", "--key-bytes", "64")
    assert made.status == 0, made.err
    to_master = ("--to", "encrypted", "--master", MASTER)
    stop = Stop(RECOVERED, kill_self)
    killed = bench.run("migrate", LABEL, *to_master, *with_file, stop=stop)
    assert (killed.status, file.exists()) == (-signal.SIGKILL, True)
    written = file.read_bytes()
    stop = Stop(HALF_UNDER_MASTER, kill_self)
    killed = bench.run("migrate", LABEL, *to_master, *with_file, stop=stop)
    assert killed.status == -signal.SIGKILL
    assert f"begun with --recovery-key {file}" in refused(
        bench, LABEL, *to_master, "--recovery-key", str(other)
    )
    assert bench.run("migrate", LABEL, *to_master).status == 0
    assert file.read_bytes() == written
    assert opened_on_a_pc(bench, file) == "ext4"
    assert not list(bench.folder.glob(".*"))


class Torn:
    """The write to a medium or a journal in which the power is cut: a part of it, and a ruin."""

    def __init__(self, at: int, chance: random.Random) -> None:
        self._left = at
        self._chance = chance
        self._write = os.pwritev

    def write(self, file: int, buffers: Sequence[mmap.mmap], offset: int) -> int:
        """In the place of os.pwritev."""
        self._left -= 1
        if self._left >= 0:
            return self._write(file, buffers, offset)
        (whole,) = buffers
        sectors = self._chance.randrange(len(whole) // 512)
        with mmap.mmap(-1, (sectors + 1) * 512) as part:
            part[: sectors * 512] = whole[: sectors * 512]
            part[sectors * 512 :] = self._chance.randbytes(512)
            self._write(file, [part], offset)
        kill_self()
        raise AssertionError("it lives")


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, MEDIA))]
)
def test_cut_at_random_points_again_and_again_a_medium_keeps_every_byte(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    before, chance = plain(bench), random.Random(seed)
    to, cuts = "trusted", 0
    while cuts < CUTS:
        with monkeypatch.context() as power:
            stop = None
            if chance.randrange(2):
                power.setattr(os, "pwritev", Torn(chance.randrange(12), chance).write)
            else:
                stop = Stop(chance.randrange(1, len(CALLS)), kill_self)
            done = migrate(bench, to=to, stop=stop)
        if done.status == 0:
            assert plain(bench) == before
            (
                bench.blobs / f"{bench.blob.name}.{'tagged' if to == 'trusted' else 'trusted'}"
            ).unlink()
            to = "tagged" if to == "trusted" else "trusted"
        else:
            assert done.status == -signal.SIGKILL, done.err
            cuts += 1
    assert migrate(bench, to=to).status == 0
    assert plain(bench) == before
    assert JOURNAL not in files(bench)


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=pytest.mark.soak)])
def test_killed_after_any_of_its_last_calls_a_migration_is_ended_by_the_next_run(
    bench: Bench, first: int
) -> None:
    """Every second of the calls is tried; the soak tries the others."""
    before, ways = plain(bench), ("trusted", "tagged")
    calls = {to: len(done_to(bench, to).calls) for to in ways}
    changes = [n for n, name in enumerate(reversed(END)) if name not in {*READ, "ioctl"}]
    for count, last in enumerate(changes[first::2]):
        to = ways[count % 2]
        stop = Stop(calls[to] - last, kill_self)
        assert migrate(bench, to=to, stop=stop).status == -signal.SIGKILL
        done_to(bench, to)
        assert plain(bench) == before


def done_to(bench: Bench, to: str) -> Done:
    """The medium is under such a key, and its old blob is not in the way of the next migration."""
    done = migrate(bench, to=to)
    assert done.status == 0, done.err
    for kept in bench.blobs.glob("*.bb.*"):
        kept.unlink()
    assert files(bench) == {bench.blob.name}
    return done


def test_a_dry_run_checks_everything_and_changes_nothing(bench: Bench) -> None:
    with unchanged(bench):
        done = migrate(bench, "--dry-run")
    assert done.status == 0, done.err
    assert tuple(done.calls) == PLANNED
    heading, *steps, end = done.out.splitlines()
    assert heading.endswith(
        f"{LABEL} would move from a tagged key to a trusted key in these steps:"
    )
    assert f"- keep the old blob as {bench.blob}.tagged" in steps
    assert end == "nothing was changed"
    half_moved(bench)
    left = {mapping.name for mapping in devmapper.ours("CAAM-COMMAND-")}
    hindered = migrate(bench, "--dry-run")
    assert (hindered.status, hindered.out) == (1, "")
    assert {mapping.name for mapping in devmapper.ours("CAAM-COMMAND-")} == left
    for name in left:
        assert "lies on it; `dmsetup remove " in hindered.err
        run("dmsetup", "remove", "--retry", name)
    with unchanged(bench):
        again = migrate(bench, "--dry-run")
    assert "- go on by " in again.out, again.err
    assert migrate(bench).status == 0


def test_a_senseless_migration_is_refused_and_changes_nothing(bench: Bench) -> None:
    disk, to = bench.medium.disk.name, ("--to", "trusted")
    assert "it is a whole disk" in refused(bench, bench.node, *to)
    assert "no partition has this label or PARTUUID" in refused(bench, "other", *to)
    assert "it needs to be root" in refused(bench, LABEL, *to, user=65534)
    with mapped(bench):
        assert "mapping witness lies on it" in refused(bench, LABEL, *to)
    kept = bench.blobs / f"{bench.blob.name}.tagged"
    kept.write_bytes(bench.blob.read_bytes())
    assert f"{kept} is there" in refused(bench, LABEL, *to)
    kept.unlink()
    recovery = str(bench.folder / "recovery")
    assert "shows them to nobody" in refused(bench, LABEL, *to, "--recovery-key", recovery)
    right = bench.blob.read_bytes()
    bench.blob.write_bytes(witness.create().blob)
    assert "through its key it has no filesystem" in refused(bench, LABEL, *to)
    bench.blob.write_bytes(right)
    run("sfdisk", "--part-type", f"/dev/{disk}", "1", "BC13C2FF-59E6-4262-A352-B275FD6F7172")
    run("udevadm", "settle")
    assert migrate(bench).status == 0  # of whatever type it is


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ('match = { partlabel = "other" }', "no rule matches it"),
        ('action = "ignore"', "no rule matches it"),
        ('key = { backend = "tagged" }', "would not open it with a trusted key"),
        ('crypt = { cipher = "capi:tk(cbc(aes))-plain" }', "would not open it with a trusted key"),
        (f'key = {{ blob = "{LABEL}.bb" }}', "opens all its media with"),
        ("crypt = { offset = 1 }", "through its key it has no filesystem"),
        ("crypt = { sector_size = 4096 }", "mount /dev/dm-"),
        ("crypt = { iv_offset = 1 }", "mount /dev/dm-"),
    ],
)
def test_a_rule_that_would_not_open_the_medium_afterwards_is_refused(
    bench: Bench, rule: str, said: str
) -> None:
    whole = bench.config.read_text()
    bench.config.write_text(f"{whole.partition('match')[0]}{rule}\n")
    assert said in refused(bench, LABEL, "--to", "trusted")
    bench.config.write_text(whole)


def test_a_directory_that_does_not_outlive_a_power_cut_is_refused(
    bench: Bench, tmp_path: Path
) -> None:
    forgetful = Path("/run/forgetful")
    forgetful.mkdir(mode=0o700)
    (forgetful / bench.blob.name).write_bytes(bench.blob.read_bytes())
    bench.config.write_text(bench.config.read_text().replace(str(bench.blobs), str(forgetful)))
    said = refused(bench, LABEL, "--to", "trusted")
    assert "write the journal to /run/forgetful: that is on tmpfs" in said
    (forgetful / bench.blob.name).unlink()
    forgetful.rmdir()


def test_an_overlay_whose_writes_cannot_be_seen_is_refused(bench: Bench) -> None:
    hidden = Path("/opt/hidden")
    hidden.mkdir(mode=0o700)
    (hidden / bench.blob.name).write_bytes(bench.blob.read_bytes())
    bench.config.write_text(bench.config.read_text().replace(str(bench.blobs), str(hidden)))
    said = refused(bench, LABEL, "--to", "trusted")
    assert "that is on an overlay, and where that writes cannot be seen" in said
    (hidden / bench.blob.name).unlink()
    hidden.rmdir()


LAST: Final = (8 << 20) // 512 - 34
"""The disk's last sector before the second copy of its table."""


@pytest.mark.parametrize(
    ("start", "offset", "sector_size"),
    [(34, 0, 512), (2048, 16, 512), (2048, 0, 4096)],
    ids=["between the tables", "from an offset on", "in large sectors"],
)
def test_a_medium_of_any_place_and_sectors_keeps_every_byte_up_to_the_tables(
    bench: Bench, start: int, offset: int, sector_size: int
) -> None:
    bench.holds(b"")
    layout = f"label: gpt\nfirst-lba: 34\nstart={start}, size={LAST - start + 1}, name={LABEL}\n"
    run("sfdisk", "-q", bench.node, stdin=layout.encode())
    run("udevadm", "settle")
    crypt = f"crypt = {{ offset = {offset}, sector_size = {sector_size} }}\n"
    bench.config.write_text(f"{bench.config.read_text()}{crypt}")
    with mapped(bench, sector_size, offset) as device:
        run("mkfs.ext4", "-q", "-b", str(max(1024, sector_size)), device)
        with open(device, "r+b", buffering=0) as file:
            file.seek(-(64 << 10), os.SEEK_END)  # in the only group's free blocks
            file.write(random.Random(0).randbytes(64 << 10))
            os.fsync(file)
    before, table = plain(bench, sector_size, offset), bench.table()
    done = migrate(bench)
    assert done.status == 0, done.err
    assert plain(bench, sector_size, offset) == before
    assert bench.table() == table


def test_encrypted_sectors_that_lie_across_blocks_are_refused(bench: Bench) -> None:
    bench.config.write_text(
        f"{bench.config.read_text()}crypt = {{ offset = 1, sector_size = 4096 }}\n"
    )
    assert "which is no multiple of 4096" in refused(bench, LABEL, "--to", "trusted")


def test_a_medium_with_a_sector_that_cannot_be_read_is_refused_before_it_is_touched(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = os.preadv

    def failing(file: int, buffers: Sequence[mmap.mmap], offset: int) -> int:
        if offset == (5 << 20):
            raise OSError(errno.EIO, "")
        return read(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    said = refused(bench, LABEL, "--to", "trusted")
    assert f"read {bench.node}: Input/output error (at byte {5 << 20})" in said


def test_a_disk_without_gpt_is_refused(bench: Bench) -> None:
    run("sfdisk", "-q", "--label", "dos", bench.node, stdin=b"2048,4MiB,83\n")
    run("udevadm", "settle")
    assert "its disk has no GPT" in refused(bench, bench.medium.partition, "--to", "trusted")


def test_a_half_moved_medium_goes_on_as_it_was_begun_or_not_at_all(bench: Bench) -> None:
    before = plain(bench)
    half_moved(bench)
    trusted_key = ("--to", "trusted")
    assert "it was begun with --to trusted" in refused(bench, LABEL, "--to", "tagged")
    late = refused(bench, LABEL, "--to", "trusted", "--recovery-key", str(bench.folder / "late"))
    assert "it was begun without a recovery key" in late
    whole = bench.config.read_text()
    bench.config.write_text(f"{whole}crypt = {{ sector_size = 4096 }}\n")
    assert "says something else than when it was begun" in refused(bench, LABEL, *trusted_key)
    bench.config.write_text(whole)
    with unchanged(bench):
        said = bench.provision().err
    assert "a medium whose migration was interrupted" in said
    run("sfdisk", "-q", "-N1", "--no-reread", bench.node, stdin=b",4MiB\n")
    run("udevadm", "settle")
    assert "was moved or resized" in refused(bench, bench.medium.partition, *trusted_key)
    run("sfdisk", "-q", "-N1", "--no-reread", bench.node, stdin=b",6MiB\n")
    run("udevadm", "settle")
    journal = bench.blobs / JOURNAL
    journal.rename(bench.folder / "aside")
    assert "no journal in" in refused(bench, bench.medium.partition, *trusted_key)
    (bench.folder / "aside").rename(journal)
    assert bench.run("migrate", bench.medium.partition, *trusted_key).status == 0
    assert plain(bench) == before


def test_a_copy_from_before_is_not_taken_for_the_medium_that_is_half_moved(bench: Bench) -> None:
    copy = bench.bytes()
    half_moved(bench)
    half = bench.bytes()
    bench.holds(copy)
    assert "is it a copy that was made before?" in refused(bench, LABEL, "--to", "trusted")
    bench.holds(half)
    assert migrate(bench).status == 0
    bench.holds(copy)
    said = refused(bench, LABEL, "--to", "trusted")
    assert f"{bench.blob} is a trusted key's already, and through that it has no filesystem" in said
