"""What is said while a medium moves, and the journal's file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from caam_hotplug.cli.migrate import _Pace
from caam_hotplug.cli.provision import Progress
from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.provisioning import migration_journal
from caam_hotplug.provisioning.migration_journal import Head
from caam_hotplug.provisioning.reencryption import Record

MB = 1_000_000
HEAD = Head(
    mark=uuid4(),
    name="archive-01",
    type=uuid4(),
    uuid=uuid4(),
    start=2048,
    length=4096,
    blob="archive-01.bb",
    before="tagged",
    after="trusted",
    old_blob=b"\0old",
    new_blob=b"new\xff",
    how="one cipher to another",
    recovery_file=None,
)


class Terminal:
    """A stream that somebody looks at, or nobody."""

    def __init__(self, *, looked_at: bool) -> None:
        self._looked_at = looked_at
        self.text = ""

    def isatty(self) -> bool:
        return self._looked_at

    def write(self, text: str) -> None:
        self.text += text

    def flush(self) -> None:
        pass


def test_who_looks_on_sees_how_far_how_fast_and_how_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    clock = iter([0.0, 1.0, 100.0]).__next__
    with Progress(terminal := Terminal(looked_at=True)) as progress:
        pace = _Pace(progress, clock)
        for done in (0, 2 * MB, 100 * MB):
            pace.reached(done, 10_000 * MB)
    assert terminal.text.split("\r\x1b[K") == [
        "",
        "moving: 0 % of 10000 MB ...",
        "moving: 0 % of 10000 MB, 2.0 MB/s, 1 h 23 min left ...",
        "moving: 1 % of 10000 MB, 1.0 MB/s, 2 h 45 min left ...",
        "",
    ]


def test_where_nobody_looks_on_there_is_a_line_for_ten_per_cent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter(range(100)).__next__
    with Progress(Terminal(looked_at=False)) as progress:
        pace = _Pace(progress, clock)
        for done in range(0, 101 * MB, 5 * MB):
            pace.reached(done, 100 * MB)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "moving: 10 % of 100 MB, 5.0 MB/s, 18 s left"
    assert lines[-1] == "moving: 100 % of 100 MB, 5.0 MB/s, 0 s left"
    assert len(lines) == 10


def test_what_an_earlier_run_has_done_does_not_count_for_the_pace(
    capsys: pytest.CaptureFixture[str],
) -> None:
    clock = iter([0.0, 1.0]).__next__
    with Progress(Terminal(looked_at=False)) as progress:
        pace = _Pace(progress, clock)
        pace.reached(90 * MB, 100 * MB)
        pace.reached(95 * MB, 100 * MB)
    assert capsys.readouterr().err == "moving: 90 % of 100 MB\n"


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The blob directory, open."""
    opened = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield opened, tmp_path
    os.close(opened)


def test_a_journal_is_found_again_with_all_that_is_in_it(blobs: tuple[int, Path]) -> None:
    opened, directory = blobs
    migration_journal.create(opened, directory, HEAD)
    assert list(migration_journal.heads(directory)) == [HEAD]
    record = Record(1, 4096, b"a piece")
    with migration_journal.opened(directory, HEAD) as begun:
        assert begun.journal.records() == [Record(0, 0, b"")]
        begun.journal.note(record)
    with migration_journal.opened(directory, HEAD) as begun:
        assert begun.journal.records() == [record, Record(0, 0, b"")]
    assert (directory / ".archive-01.bb.migration").stat().st_mode & 0o777 == 0o600
    migration_journal.remove(opened, directory, HEAD)
    assert list(migration_journal.heads(directory)) == []


def test_two_do_not_go_on_with_one_medium(blobs: tuple[int, Path]) -> None:
    opened, directory = blobs
    migration_journal.create(opened, directory, HEAD)
    with (
        migration_journal.opened(directory, HEAD),
        pytest.raises(HotplugError, match="another `migrate` does already"),
        migration_journal.opened(directory, HEAD),
    ):
        raise AssertionError("it was opened")


def test_a_journal_that_was_replaced_is_not_gone_on_with(blobs: tuple[int, Path]) -> None:
    opened, directory = blobs
    migration_journal.create(opened, directory, replace(HEAD, mark=uuid4()))
    with (
        pytest.raises(HotplugError, match="it was replaced meanwhile"),
        migration_journal.opened(directory, HEAD),
    ):
        raise AssertionError("it was opened")


def test_a_journal_is_never_overwritten(blobs: tuple[int, Path]) -> None:
    opened, directory = blobs
    migration_journal.create(opened, directory, HEAD)
    with pytest.raises(HotplugError, match="it exists, and is not overwritten"):
        migration_journal.create(opened, directory, replace(HEAD, mark=uuid4()))
    assert list(migration_journal.heads(directory)) == [HEAD]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"\xff\xfe", HEAD.to_json().replace(b'"version": 1', b'"version": 2')],
)
def test_a_file_that_is_no_journal_of_this_version_is_told(
    blobs: tuple[int, Path], content: bytes
) -> None:
    (blobs[1] / ".archive-01.bb.migration").write_bytes(content)
    with pytest.raises(HotplugError, match="it is no journal of this version"):
        list(migration_journal.heads(blobs[1]))


def test_a_link_in_the_place_of_a_journal_is_not_followed(blobs: tuple[int, Path]) -> None:
    (blobs[1] / ".archive-01.bb.migration").symlink_to("elsewhere")
    with pytest.raises(KernelError, match="Too many levels of symbolic links"):
        list(migration_journal.heads(blobs[1]))


def test_what_ends_before_all_is_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"four")
    with (tmp_path / "short").open("r+b") as file:
        blocks = Blocks(file.fileno(), "short", 2)
        assert blocks.read(0, 2) == b"ur"
        with pytest.raises(KernelError, match=r"read short: .*at byte 3"):
            blocks.read(1, 2)
        blocks.write(1, b"ld")
        blocks.flush()
    assert (tmp_path / "short").read_bytes() == b"fould"
