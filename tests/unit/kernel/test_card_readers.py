from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import card_readers

READER = {
    "class/block/sda/events": "media_change eject_request\n",
    "class/block/sda/events_async": "\n",
    "class/block/sda/events_poll_msecs": "-1\n",
    "class/block/sda/removable": "1\n",
    "module/block/parameters/events_dfl_poll_msecs": "0\n",
}
"""Files of a reader that nobody polls, as a machine without udevd has them."""


def tree(folder: Path, **changed: str) -> int:
    """Make these files, and return a descriptor of the folder."""
    for name, text in READER.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(changed.get(file.name, text))
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY)


@pytest.fixture
def opened() -> Iterator[list[int]]:
    made: list[int] = []
    yield made
    for descriptor in made:
        os.close(descriptor)


def test_a_reader_that_nobody_polls_is_found_and_polled_once(
    tmp_path: Path, opened: list[int]
) -> None:
    opened.append(root := tree(tmp_path))
    assert card_readers.is_unpolled("sda", root)
    card_readers.poll("sda", tmp_path)
    assert (tmp_path / "class/block/sda/events_poll_msecs").read_text() == "2000"
    assert not card_readers.is_unpolled("sda", root)


@pytest.mark.parametrize(
    "changed",
    [
        {"events": "eject_request\n"},
        {"events_async": "media_change\n"},
        {"events_poll_msecs": "0\n"},
        {"removable": "0\n"},
        {"events_dfl_poll_msecs": "2000\n"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_disk_that_needs_no_polling_or_is_not_to_be_polled_is_left_alone(
    tmp_path: Path, opened: list[int], changed: dict[str, str]
) -> None:
    opened.append(root := tree(tmp_path, **changed))
    assert not card_readers.is_unpolled("sda", root)


def test_what_is_no_disk_is_no_reader(tmp_path: Path, opened: list[int]) -> None:
    opened.append(root := tree(tmp_path))
    assert not card_readers.is_unpolled("sda1", root)
    with pytest.raises(KernelError, match="poll /dev/sdb"):
        card_readers.poll("sdb", tmp_path)
