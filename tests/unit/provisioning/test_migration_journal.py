"""The journal's file, and who reads it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.kernel.direct_io import Blocks
from caam_hotplug.provisioning import migration_journal
from caam_hotplug.provisioning.migration_journal import Head
from caam_hotplug.provisioning.reencryption import Record

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


@pytest.fixture
def blobs(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """The blob directory, open."""
    opened = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield opened, tmp_path
    os.close(opened)


def test_a_journal_is_read_as_it_was_written(blobs: tuple[int, Path]) -> None:
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


def test_only_one_process_goes_on_with_a_medium(blobs: tuple[int, Path]) -> None:
    opened, directory = blobs
    migration_journal.create(opened, directory, HEAD)
    with (
        migration_journal.opened(directory, HEAD),
        pytest.raises(HotplugError, match="another `migrate` does already"),
        migration_journal.opened(directory, HEAD),
    ):
        raise AssertionError("it was opened")


def test_nobody_goes_on_by_a_journal_that_was_replaced(blobs: tuple[int, Path]) -> None:
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
def test_a_file_that_is_no_journal_of_this_version_is_refused(
    blobs: tuple[int, Path], content: bytes
) -> None:
    (blobs[1] / ".archive-01.bb.migration").write_bytes(content)
    with pytest.raises(HotplugError, match="it is no journal of this version"):
        list(migration_journal.heads(blobs[1]))


def test_a_link_in_the_place_of_a_journal_is_not_followed(blobs: tuple[int, Path]) -> None:
    (blobs[1] / ".archive-01.bb.migration").symlink_to("elsewhere")
    with pytest.raises(KernelError, match="Too many levels of symbolic links"):
        list(migration_journal.heads(blobs[1]))


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"four")
    with (tmp_path / "short").open("r+b") as file:
        blocks = Blocks(file.fileno(), "short", 2)
        assert blocks.read(0, 2) == b"ur"
        with pytest.raises(KernelError, match=r"read short: .*at byte 3"):
            blocks.read(1, 2)
        blocks.write(1, b"ld")
        blocks.flush()
    assert (tmp_path / "short").read_bytes() == b"fould"
