"""The record of a partition that is not finished is read as it was written, or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError, KernelError
from caam_hotplug.kernel.partition_table import Place
from caam_hotplug.keys import store
from caam_hotplug.model import Sectors
from caam_hotplug.provisioning import partition_record
from caam_hotplug.provisioning.partition_record import Record, digest_of

BLOB = "recorder.bb"
SEALED = bytes(range(96))
RECORD = Record(
    disk="1234abcd",
    serial="0x5a",
    number=2,
    start=6144,
    length=4096,
    partuuid="1234abcd-02",
    settings="--fs ext4",
    backend="tagged",
    blob=SEALED,
    digest=digest_of(SEALED),
    recovery=None,
)


@pytest.fixture
def directory(roots_folder: Path) -> Path:
    made = roots_folder / "caam"
    made.mkdir(mode=0o700)
    return made


def written(directory: Path, record: Record = RECORD) -> Path:
    with store.folder(directory) as folder:
        partition_record.create(folder.opened, directory, BLOB, record)
    return partition_record.file(directory, BLOB)


def test_a_record_is_read_as_it_was_written_and_is_roots_alone(directory: Path) -> None:
    path = written(directory)
    assert (path.name, path.stat().st_mode & 0o777) == (".recorder.bb.provision", 0o600)
    assert partition_record.find(directory, BLOB) == RECORD


def test_there_is_none_where_none_was_written(directory: Path) -> None:
    assert partition_record.find(directory, BLOB) is None
    assert partition_record.find(directory / "none", BLOB) is None


def test_a_record_is_not_overwritten(directory: Path) -> None:
    written(directory)
    with pytest.raises(HotplugError, match="it exists, and is not overwritten"):
        written(directory)


def test_a_record_is_removed_once(directory: Path) -> None:
    path = written(directory)
    with store.folder(directory) as folder:
        for _ in range(2):
            partition_record.remove(folder.opened, directory, BLOB)
    assert not path.exists()


PLACE = Place(2, Sectors(6144), Sectors(4096))
OTHERS: list[tuple[str, str | None, Place]] = [
    ("x", "0x5a", PLACE),
    ("1234abcd", "0x5b", PLACE),
    ("1234abcd", None, PLACE),
    ("1234abcd", "0x5a", replace(PLACE, number=3)),
    ("1234abcd", "0x5a", replace(PLACE, start=Sectors(6145))),
    ("1234abcd", "0x5a", replace(PLACE, size=Sectors(1))),
]


@pytest.mark.parametrize("other", OTHERS)
def test_a_record_is_of_one_place_alone(other: tuple[str, str | None, Place]) -> None:
    assert RECORD.is_of("1234abcd", "0x5a", PLACE)
    assert not RECORD.is_of(*other)


FACTS = json.loads(RECORD.to_json())
CHANGED = {
    "empty": "",
    "no object": "[]",
    "nested": "[" * 20000,
    "fewer fields": json.dumps({k: v for k, v in FACTS.items() if k != "start"}),
    "more fields": json.dumps(FACTS | {"x": 1}),
    "another version": json.dumps(FACTS | {"version": 2}),
    "a text for a number": json.dumps(FACTS | {"start": "6144"}),
    "another kind of key": json.dumps(FACTS | {"backend": "none"}),
    "no base64": json.dumps(FACTS | {"blob": "?"}),
    "another blob": json.dumps(FACTS | {"blob": "AAAA"}),
    "a number for a blob": json.dumps(FACTS | {"blob": 3}),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_file_that_no_run_has_written_is_refused(directory: Path, change: str) -> None:
    path = partition_record.file(directory, BLOB)
    path.write_text(CHANGED[change])
    with pytest.raises(HotplugError) as refused:
        partition_record.find(directory, BLOB)
    assert str(refused.value).startswith(f"read {path}: it is no record of this version of ")


def test_a_link_in_the_place_of_a_record_is_not_followed(directory: Path) -> None:
    written(directory).rename(directory / "elsewhere")
    partition_record.file(directory, BLOB).symlink_to("elsewhere")
    with pytest.raises(KernelError):
        partition_record.find(directory, BLOB)
