"""One partition of a disk in use is made, and nothing else of the disk is changed. In the guest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from kernel.forked import Stop, kill_self
from kernel.partitions import (
    LENGTH,
    LINUX,
    MAKERS,
    MBR_UUID,
    RECORDER,
    START,
    UNFINISHED,
    BoardDisk,
    board_disk,
    changeable,
    has_whole_tables,
    others,
    uevents,
)
from kernel.provisioning import TRIED, Bench, opened_on_a_pc, refused
from kernel.witness import run


@pytest.fixture(params=["gpt", "dos"])
def board(bench: Bench, request: pytest.FixtureRequest) -> Iterator[BoardDisk]:
    """A disk with a table of each kind."""
    with board_disk(bench, request.param) as made:
        yield made


@pytest.fixture
def gpt_board(bench: Bench) -> Iterator[BoardDisk]:
    with board_disk(bench, "gpt") as made:
        yield made


@pytest.fixture
def mbr_board(bench: Bench) -> Iterator[BoardDisk]:
    with board_disk(bench, "dos") as made:
        yield made


@contextmanager
def mounted(node: str, point: str = "/mnt", options: str = "ro") -> Iterator[None]:
    Path(point).mkdir(exist_ok=True)
    run("mount", "-o", options, node, point)
    try:
        yield
    finally:
        run("umount", point)


@pytest.mark.parametrize("use", ["mounted", "not used"])
def test_a_partition_is_made_beside_its_neighbours_and_no_other_byte_is_changed(
    board: BoardDisk, use: str
) -> None:
    before = board.bench.bytes()
    with ExitStack() as stack:
        if use == "mounted":
            stack.enter_context(mounted(f"{board.bench.node}1"))
        with uevents(board.bench.medium.disk.name) as seen:
            done = board.provision()
            assert done.status == 0, done.err
        assert done.out == f"{board.node}: {RECORDER} is made; its key is in {board.blob}\n"
        board.is_made()
    after = board.bench.bytes()
    assert others(after, board.kind) == others(before, board.kind)
    assert set(seen) == {f"change {board.name}"}
    if board.kind == "gpt":
        assert has_whole_tables(after)
        assert board.entries()[1]["type"] == LINUX


def test_a_neighbour_is_written_to_meanwhile(board: BoardDisk) -> None:
    with mounted(f"{board.bench.node}1", options="rw"):
        file = Path("/mnt/log")
        file.write_bytes(b"before")
        assert board.provision().status == 0
        with file.open("ab") as log:
            log.write(b" and after")
            os.fsync(log.fileno())
        board.is_made()
    with mounted(f"{board.bench.node}1"):
        assert file.read_bytes() == b"before and after"


def test_its_identifier_stays_and_udev_has_its_new_type(gpt_board: BoardDisk) -> None:
    before = gpt_board.entries()
    assert before[1]["type"] == MAKERS
    assert gpt_board.provision().status == 0
    after = gpt_board.entries()
    assert after == [before[0], {**before[1], "type": LINUX}, before[2]]
    shown = run("udevadm", "info", "--query=property", gpt_board.node)
    assert f"ID_PART_ENTRY_TYPE={LINUX.lower()}" in shown
    assert f"ID_PART_ENTRY_NAME={RECORDER}\n" in shown


WAYS = {
    "node": lambda board: board.node,
    "link": lambda board: f"/dev/disk/by-partuuid/{board.entries()[1]['uuid'].lower()}",
    "label": lambda _board: RECORDER,
    "tagged label": lambda _board: f"PARTLABEL={RECORDER}",
    "identifier": lambda board: board.entries()[1]["uuid"],
    "tagged identifier": lambda board: f"PARTUUID={board.entries()[1]['uuid'].lower()}",
}


@pytest.mark.parametrize("way", WAYS)
def test_a_partition_is_named_by_node_label_or_identifier(gpt_board: BoardDisk, way: str) -> None:
    device = WAYS[way](gpt_board)
    label = [] if "label" in way else ["--label", RECORDER]
    done = gpt_board.bench.run("provision", device, *label, "--dry-run")
    assert done.status == 0, done.err
    assert done.out.startswith(f"{gpt_board.node}: {RECORDER} would be made in these steps:")


def test_another_label_is_written_with_the_type(gpt_board: BoardDisk) -> None:
    done = gpt_board.bench.run("provision", gpt_board.node, "--label", "archive")
    assert done.status == 0, done.err
    assert gpt_board.entries()[1]["name"] == "archive"
    assert (gpt_board.bench.blobs / "archive.bb").exists()


def test_a_second_run_finds_it_made_and_changes_nothing(board: BoardDisk) -> None:
    assert board.provision().status == 0
    before = board.bench.bytes()
    done = board.provision("--erase", board.name)
    assert (done.status, "was made before; nothing was erased" in done.out) == (0, True), done.err
    assert board.bench.bytes() == before


def test_a_dry_run_says_what_it_would_do(board: BoardDisk) -> None:
    run("mkfs.ext4", "-q", board.node)
    options = ("--erase", board.name, "--dry-run")
    before = board.bench.bytes()
    done = board.provision(*options)
    assert (done.status, tuple(done.calls)) == (0, (*NODE, *TRIED)), done.err
    label = f" and the label {RECORDER}" if board.kind == "gpt" else ""
    assert done.out.splitlines() == [
        f"{board.node}: {RECORDER} would be made in these steps:",
        "- make a key of 16 bytes",
        f"- seal the key as a tagged key, and write it to {board.record}",
        f"- erase {board.node}, which holds ext4 (a filesystem, or a header)",
        f"- give it the partition type of one that is not finished{label}",
        "- make the filesystem ext4, encrypted with capi:tk(cbc(aes))-plain in sectors of 512 "
        "bytes",
        f"- write {board.blob}",
        "- write the type of Linux data to its entry in the partition table",
        f"- remove {board.record}",
        "nothing was changed",
    ]
    assert board.bench.bytes() == before
    assert not board.bench.blobs.exists()


def test_a_rule_is_written_that_opens_it(board: BoardDisk) -> None:
    done = board.provision("--rule")
    assert done.status == 0, done.err
    explained = board.bench.run("explain", board.node)
    assert f"rule '{RECORDER}' matches it" in explained.out


def test_a_recovery_file_opens_it(gpt_board: BoardDisk) -> None:
    file = gpt_board.bench.folder / "recovery"
    assert gpt_board.provision("--recovery-key", str(file)).status == 0
    again = gpt_board.provision("--recovery-key", str(file))
    assert (again.status, "was not checked" in again.err) == (0, True), again.err
    gpt_board.is_made()


# interrupted


NODE = ("fsopen", "fsconfig", "fsmount")
"""A node of the disk is made that no other program sees."""
WRITES = {"gpt": (*NODE, "pwritev", "pwritev"), "dos": (*NODE, "pwritev")}
"""An entry is written."""


def calls(kind: str) -> tuple[str, ...]:
    """The calls that change something, in their order."""
    return (
        *NODE, *TRIED,
        # the record, with the key
        "mkdir", "fsync", "ioctl", "fsync", "renameat2", "fsync",
        # the filesystem, in a partition that is marked
        "dm create", "ioctl", "add_key", "dm load", "keyctl_unlink", "dm resume",
        *WRITES[kind], "make", "fsync", "dm remove",
        # the blob
        "fsync", "renameat2", "fsync",
        # the type; the record is gone
        *WRITES[kind], "unlink", "fsync",
    )  # fmt: skip


def test_the_calls_are_those_whose_cuts_are_tried(board: BoardDisk) -> None:
    assert tuple(board.provision().calls) == calls(board.kind)


CUTS = [
    pytest.param(
        kind, n, id=f"{kind}-{n}-{call.replace(' ', '-')}",
        marks=[] if n % 8 == (kind == "dos") or "write" in call else [pytest.mark.soak],
    )
    for kind in WRITES
    for n, call in enumerate(calls(kind), 1)
    if n > len(NODE + TRIED)
]  # fmt: skip


@pytest.mark.parametrize(("kind", "call"), CUTS)
def test_killed_after_any_call_the_partition_is_as_it_was_or_has_its_key_and_is_completed(
    bench: Bench, kind: str, call: int
) -> None:
    with board_disk(bench, kind) as board, mounted(f"{bench.node}1"):
        before = bench.bytes()
        assert board.provision(stop=Stop(call, kill_self)).status == -signal.SIGKILL
        cut = bench.bytes()
        assert others(cut, kind) == others(before, kind)
        assert kind == "dos" or has_whole_tables(cut)
        kept = board.blob.exists() or board.record.exists()
        assert kept or cut == before
        is_finished = board.entries()[1]["type"] in {LINUX, "83"}
        assert board.blob.exists() or not is_finished
        is_partly_made = cut[START : START + LENGTH] != before[START : START + LENGTH]
        if is_partly_made and not is_finished:
            assert board.entries()[1]["type"] == (UNFINISHED if kind == "gpt" else "da")
        blob = board.blob.read_bytes() if board.blob.exists() else b""
        done = board.provision()
        assert done.status == 0, done.err
        board.is_made()
        assert board.blob.read_bytes() == (blob or board.blob.read_bytes())
        assert others(bench.bytes(), kind) == others(before, kind)


@pytest.mark.parametrize("after", ["mkdir", "renameat2", "make"])
def test_killed_with_a_recovery_file_its_key_stays_the_partitions(
    gpt_board: BoardDisk, after: str
) -> None:
    file = gpt_board.bench.folder / "recovery"
    recovery = ("--recovery-key", str(file))
    numbers = {"mkdir": 12 + 3, "renameat2": 14 + 3, "make": calls("gpt").index("make") + 6}
    stop = Stop(numbers[after], kill_self)
    assert gpt_board.provision(*recovery, stop=stop).status == -signal.SIGKILL
    assert gpt_board.provision(*recovery).status == 0
    gpt_board.is_made()
    assert not list(gpt_board.bench.folder.glob(".*"))
    assert opened_by_recovery(gpt_board, file) == "ext4"


def opened_by_recovery(board: BoardDisk, file: Path) -> str:
    text = file.read_text().replace(f" {RECORDER}\n", " cartridge-05\n")
    copy = file.with_name("copy")
    copy.write_text(text)
    return opened_on_a_pc(board.bench, copy)


BEGUN = calls("gpt").index("make")


def test_what_was_begun_goes_on_only_there_and_with_the_same_options(gpt_board: BoardDisk) -> None:
    stop = Stop(BEGUN, kill_self)
    assert gpt_board.provision(stop=stop).status == -signal.SIGKILL
    bench = gpt_board.bench
    said = refused(bench, RECORDER, "--key-bytes", "32")
    assert "it was begun with --backend tagged --key-bytes 16 --seal ecb" in said
    assert f"remove {gpt_board.record} to begin anew" in said
    said = refused(bench, f"{bench.node}3", "--label", RECORDER)
    assert f"partition 2 has the label {RECORDER} already; choose another" in said
    said = refused(bench, RECORDER, "--label", "archive")
    assert "it holds a medium that is not finished, begun with another label" in said
    gpt_board.record.unlink()
    assert "it holds a medium that is not finished" in refused(bench, RECORDER)
    done = gpt_board.provision("--erase", gpt_board.name)
    assert done.status == 0, done.err
    gpt_board.is_made()


def test_what_the_agent_has_mapped_already_is_finished_by_the_same_command(
    board: BoardDisk,
) -> None:
    """Cut before the record is removed: the agent finds the blob, and maps the partition."""
    stop = Stop(calls(board.kind).index("unlink"), kill_self)
    assert board.provision(stop=stop).status == -signal.SIGKILL
    with mapped(board.node):
        done = board.provision()
        assert (done.status, done.calls[-2:]) == (0, ["unlink", "fsync"]), done.err
        done = board.provision()
        assert (done.status, "was made before" in done.out) == (0, True), done.err
    board.is_made()


@contextmanager
def mapped(node: str) -> Iterator[None]:
    run("dmsetup", "create", "others", "--table", f"0 8 linear {node} 0")
    try:
        yield
    finally:
        run("dmsetup", "remove", "--retry", "others")


def test_what_was_begun_is_not_erased_again_where_another_has_its_place(
    mbr_board: BoardDisk,
) -> None:
    """A clone of the card has the same identifier, and no mark."""
    stop = Stop(calls("dos").index("make"), kill_self)
    assert mbr_board.provision(stop=stop).status == -signal.SIGKILL
    for mapping in mbr_board.bench.left():  # a power cut would have removed it, too
        run("dmsetup", "remove", "--retry", mapping)
    run("mkfs.ext4", "-q", mbr_board.node)
    said = refused(mbr_board.bench, MBR_UUID, "--label", RECORDER)
    assert (
        "it holds ext4 (a filesystem, or a header); if all of it may be lost, say so with " in said
    )
    assert mbr_board.provision("--erase", mbr_board.name).status == 0
    mbr_board.is_made()


# refusals: nothing is changed


def test_a_partition_that_is_mounted_is_refused(board: BoardDisk) -> None:
    run("mkfs.ext4", "-q", board.node)
    with mounted(board.node):
        said = refused_partition(board, "--erase", board.name)
    assert f"use {board.node}: it is in use: mounted at /mnt" in said


def refused_partition(board: BoardDisk, *more: str) -> str:
    device = RECORDER if board.kind == "gpt" else MBR_UUID
    return refused(board.bench, device, "--label", RECORDER, *more)


def test_swap_space_is_refused(gpt_board: BoardDisk) -> None:
    run("mkswap", "-q", gpt_board.node)
    run("swapon", gpt_board.node)
    try:
        said = refused_partition(gpt_board, "--erase", gpt_board.name)
    finally:
        run("swapoff", gpt_board.node)
    assert "it is in use: swap space" in said


def test_a_partition_under_a_mapping_or_a_loop_device_is_refused(gpt_board: BoardDisk) -> None:
    with mapped(gpt_board.node):
        said = refused_partition(gpt_board)
    assert "it is in use: mapping others lies on it" in said
    for node in (gpt_board.node, gpt_board.bench.node):  # that over the disk may have it, too
        loop = run("losetup", "--find", "--show", node).strip()
        try:
            assert f"{Path(loop).name} lies on it" in refused_partition(gpt_board)
        finally:
            run("losetup", "-d", loop)


def test_a_partition_that_is_held_exclusively_is_refused(board: BoardDisk) -> None:
    file = os.open(board.node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    try:
        said = refused_partition(board)
    finally:
        os.close(file)
    assert f"process {os.getpid()} " in said


CONTENTS = {
    "a filesystem": ("ext4", "it holds ext4 (a filesystem, or a header)"),
    "noise": ("noise", "it holds something that no program here knows, at byte"),
}


@pytest.mark.parametrize("content", CONTENTS)
def test_content_is_erased_only_by_the_partitions_name(board: BoardDisk, content: str) -> None:
    kind, words = CONTENTS[content]
    if kind == "ext4":
        run("mkfs.ext4", "-q", board.node)
    else:
        with open(board.node, "r+b", buffering=0) as file:
            file.seek(1 << 20)
            file.write(os.urandom(1 << 20))
            os.fsync(file)
    run("udevadm", "settle")
    said = refused_partition(board)
    assert words in said
    assert f"say so with --erase {board.name}" in said
    disk = board.bench.medium.disk.name
    said = refused_partition(board, "--erase", disk)
    assert f"--erase names {disk}, and this is {board.name}; nothing was erased" in said
    assert board.provision("--erase", board.name).status == 0
    board.is_made()


SYSTEMS = {
    "it is an EFI system partition": ("--part-type", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B"),
    "its entry says that the board boots from it": ("--part-attrs", "LegacyBIOSBootable"),
    "its entry says that the board needs it": ("--part-attrs", "RequiredPartition"),
}


@pytest.mark.parametrize("why", SYSTEMS)
def test_a_partition_that_the_system_boots_from_is_refused(gpt_board: BoardDisk, why: str) -> None:
    option, value = SYSTEMS[why]
    run("sfdisk", "-q", "--no-reread", "--force", option, gpt_board.bench.node, "2", value)
    run("udevadm", "settle")
    said = refused_partition(gpt_board, "--erase", gpt_board.name)
    assert f"use {gpt_board.node}: it is the system's own: " in said
    assert why in said


@pytest.mark.parametrize("source", [f"PARTLABEL={RECORDER}", "node", "UUID"])
def test_a_partition_that_fstab_has_for_the_system_is_refused(
    gpt_board: BoardDisk, tmp_path: Path, source: str
) -> None:
    run("mkfs.ext4", "-q", gpt_board.node)
    run("udevadm", "settle")
    uuid = run("blkid", "-p", "-o", "value", "-s", "UUID", gpt_board.node).strip()
    named = {"node": gpt_board.node, "UUID": f'UUID="{uuid}"'}.get(source, source)
    fstab = tmp_path / "fstab"
    fstab.write_text(f"{named} /boot/firmware auto noauto 0 0\n")
    run("mount", "--bind", str(fstab), "/etc/fstab")
    try:
        said = refused_partition(gpt_board, "--erase", gpt_board.name)
    finally:
        run("umount", "/etc/fstab")
    assert "it is the system's own: /etc/fstab mounts it at /boot/firmware" in said


def test_a_logical_or_an_extended_partition_is_refused(mbr_board: BoardDisk) -> None:
    bench = mbr_board.bench
    said = refused(bench, f"{bench.node}5", "--label", "x")
    assert "partition 5 is a logical one" in said
    assert "partition 3 is an extended one" in refused(bench, f"{bench.node}3", "--label", "x")


@pytest.mark.parametrize("at", [512, -512], ids=["first", "second"])
def test_a_table_with_a_damaged_copy_is_refused(gpt_board: BoardDisk, at: int) -> None:
    size = os.path.getsize(gpt_board.bench.node) or len(gpt_board.bench.bytes())
    with open(gpt_board.bench.node, "r+b", buffering=0) as disk, mounted(f"{disk.name}1"):
        disk.seek(at % size + 60)
        disk.write(b"\x01\x02")
        os.fsync(disk)
        said = refused_partition(gpt_board)
    assert f"change the partition table of {gpt_board.bench.node}: its copy at block" in said
    assert "is damaged" in said


def test_two_partitions_of_a_label_are_refused_with_their_nodes(gpt_board: BoardDisk) -> None:
    node = gpt_board.bench.node
    run("sfdisk", "-q", "--no-reread", "--force", "--part-label", node, "3", RECORDER)
    run("udevadm", "settle")
    assert f"2 partitions have this label; name the device: {node}2, {node}3" in refused(
        gpt_board.bench, RECORDER
    )


BAD = {
    "label": (("../x", "--label", "x"), "look at ../x: No such file"),
    "no label": (("nothing",), "provision nothing: no partition has this label or PARTUUID"),
    "bad label": ((RECORDER, "--label", "../x"), "use label '../x': it starts with '.'"),
    "long label": ((RECORDER, "--label", "x" * 33), "partition 2 has more than 32 characters"),
    "filesystem": ((RECORDER, "--fs", "xfs"), "xfs needs 300 MiB at least"),
    "cipher": ((RECORDER, "--cipher", "aes-cbc-plain"), "load table of mapping"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_changes_nothing(gpt_board: BoardDisk, bad: str) -> None:
    arguments, words = BAD[bad]
    assert words in refused(gpt_board.bench, *arguments)


def test_a_blob_of_the_label_is_never_replaced(gpt_board: BoardDisk) -> None:
    gpt_board.bench.blobs.mkdir(mode=0o700)
    gpt_board.blob.write_bytes(b"whatever it is")
    assert "whatever was encrypted with it would be lost" in refused_partition(gpt_board)


def test_every_place_that_may_change_is_known(board: BoardDisk) -> None:
    assert len(changeable(board.bench.bytes(), board.kind)) in {1, 2 * 128 + 4 * 4}
