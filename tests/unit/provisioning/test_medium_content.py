"""What `provision` takes for blank, and what for something that could be lost."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import udev
from caam_hotplug.provisioning import temporary_mapping
from unit.workshop import LABEL, Workshop, disk_of

SIZE = 24 << 20
RULE = """
[[rule]]
name = "archives"
match.devtype = "disk"
key.blob = "archive.bb"
mount.name = "archive"
"""


def put(medium: Path, at: int, content: bytes) -> None:
    """Write the bytes to the medium, at this place."""
    with medium.open("r+b") as file:
        file.seek(at)
        file.write(content)


def refusal(workshop: Workshop, medium: Path) -> str:
    """Return the words of `provision` without --erase, which changes nothing."""
    before = workshop.contents()
    with pytest.raises(HotplugError) as refused:
        workshop.make(medium)
    assert workshop.contents() == before
    return str(refused.value)


NOISE: dict[str, Callable[[], tuple[int, bytes]]] = {
    "in the place of the table": lambda: (1024, os.urandom(512)),
    "after it": lambda: (512 << 10, os.urandom(512)),
    "a text": lambda: (512 << 10, b"Dear diary"),
    "in the middle": lambda: (10 << 20, os.urandom(1 << 20)),
    "at the end": lambda: (SIZE - 512, os.urandom(512)),
}


@pytest.mark.parametrize("where", NOISE)
def test_a_medium_that_is_not_blank_is_erased_only_by_its_name(
    workshop: Workshop, where: str
) -> None:
    medium = workshop.medium()
    put(medium, *NOISE[where]())
    said = refusal(workshop, medium)
    assert "it holds something that no program here knows, at byte " in said
    assert f"if all of it may be lost, say so with --erase {disk_of(medium).name}" in said
    assert not workshop.make(medium, erase=disk_of(medium).name).was_made_before


def test_a_medium_of_erased_flash_is_blank(workshop: Workshop) -> None:
    medium = workshop.medium()
    put(medium, 0, b"\xff" * SIZE)
    assert not workshop.make(medium).was_made_before


def test_half_a_table_of_a_run_that_was_cut_is_no_content(workshop: Workshop) -> None:
    whole = workshop.medium("whole.img")
    workshop.make(whole)
    workshop.blob.unlink()
    medium = workshop.medium()
    put(medium, 1024, whole.read_bytes()[1024 : 34 * 512])  # entries without their header
    assert not workshop.make(medium).was_made_before


@pytest.fixture
def archive(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A blank disk that a rule matches, with its blob on the board."""
    medium = workshop.medium()
    workshop.make(workshop.medium("other.img"), label="archive")
    workshop.config_file.write_text(f'source = "udev"\nblob_directory = "{workshop.blobs}"\n{RULE}')
    found = SimpleNamespace(volume=lambda _node: disk_of(medium), close=lambda: None)
    monkeypatch.setattr(udev, "Devices", lambda _source: found)
    return medium


def test_a_blank_disk_that_a_rule_matches_is_blank(workshop: Workshop, archive: Path) -> None:
    assert not workshop.make(archive).was_made_before


def test_a_disk_that_a_rule_of_this_board_opens_is_named_by_the_rule(
    workshop: Workshop, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = workshop.folder / "plain"
    plain.write_bytes(bytes(4 << 20))
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", "-F", plain], check=True)

    @contextmanager
    def opened(*_arguments: object, **_more: object) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(node=str(plain))

    monkeypatch.setattr(temporary_mapping, "through_key", opened)
    assert (
        "it holds the volume of rule 'archives': ext4 (a filesystem, or a header), under the key "
        f"of {workshop.blobs}/archive.bb; if all of it may be lost"
    ) in refusal(workshop, archive)


def test_a_disk_that_may_be_a_rules_volume_is_not_erased_unasked(
    workshop: Workshop, archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_arguments: object, **_more: object) -> None:
        raise HotplugError("load table of mapping x: No such file or directory")

    monkeypatch.setattr(temporary_mapping, "through_key", fails)
    assert "it holds what may be the volume of rule 'archives', under" in refusal(workshop, archive)


@pytest.mark.parametrize("content", [b"", b"no blob"])
def test_a_rule_without_a_good_blob_opens_nothing(
    workshop: Workshop, archive: Path, content: bytes
) -> None:
    blob = workshop.blobs / "archive.bb"
    blob.unlink()
    if content:
        blob.write_bytes(content)
    assert not workshop.make(archive, label=LABEL).was_made_before
