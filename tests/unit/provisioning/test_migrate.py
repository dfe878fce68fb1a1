"""What `migrate` does when board or medium change between plan and act; on images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from caam_hotplug.errors import HotplugError, MappingBusyError
from caam_hotplug.kernel import disks, gpt
from caam_hotplug.keys import store
from caam_hotplug.model import Mapping
from caam_hotplug.provisioning import (
    marked_partition,
    medium_blocks,
    migrate,
    migration_journal,
    temporary_mapping,
)
from caam_hotplug.provisioning.migration_journal import Head
from caam_hotplug.provisioning.reencryption import Record
from unit.workshop import LABEL, MigrationWorkshop, disk_of, nothing

PIECE = Record(1, 0, b"the only copy of a piece")


def while_read(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Something happens while all of the medium is read, which may take an hour."""
    monkeypatch.setattr(medium_blocks, "require_readable", lambda *_: act())


def begun(workshop: MigrationWorkshop, head: Head) -> None:
    """A migration has written the first piece to its journal."""
    with migration_journal.opened(workshop.blobs, head) as migration:
        migration.journal.note(PIECE)


def test_a_medium_moves_to_its_new_key_and_keeps_its_old_blob(
    migration_workshop: MigrationWorkshop,
) -> None:
    workshop = migration_workshop
    medium = workshop.made()
    old = workshop.blob.read_bytes()
    workshop.journal()
    kept = workshop.migrate("trusted").kept
    assert kept is not None
    assert kept.read_bytes() == old != workshop.blob.read_bytes()
    assert workshop.identity(medium).name == LABEL
    assert {path.name for path in workshop.blobs.iterdir()} == {workshop.blob.name, kept.name}


def test_an_unused_journal_that_is_begun_after_the_plan_was_made_is_not_removed(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = migration_workshop
    workshop.made()
    journal = workshop.journal()
    (head,) = migration_journal.heads(workshop.blobs)
    while_read(monkeypatch, lambda: begun(workshop, head))
    with pytest.raises(HotplugError, match=f"{journal}: it was replaced meanwhile; try again"):
        workshop.migrate("trusted")
    with migration_journal.opened(workshop.blobs, head) as migration:
        assert migration.journal.records()[0] == PIECE


def test_the_journal_of_another_medium_in_the_place_of_an_unused_one_is_not_removed(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = migration_workshop
    workshop.made()
    journal = workshop.journal()
    (head,) = migration_journal.heads(workshop.blobs)
    other = replace(head, mark=uuid4(), uuid=uuid4())

    def replaced() -> None:
        journal.unlink()
        with store.folder(workshop.blobs) as folder:
            migration_journal.create(folder.opened, workshop.blobs, other)
        begun(workshop, other)

    while_read(monkeypatch, replaced)
    with pytest.raises(HotplugError, match=f"{journal}: it was replaced meanwhile; try again"):
        workshop.migrate("trusted")
    with migration_journal.opened(workshop.blobs, other) as migration:
        assert migration.journal.records()[0] == PIECE


def test_a_refused_mapping_leaves_no_recovery_file(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = migration_workshop
    workshop.made()

    def refused(*_arguments: object, **_more: object) -> None:
        raise MappingBusyError("load table of mapping", "x", 16)

    while_read(monkeypatch, lambda: monkeypatch.setattr(temporary_mapping, "through_key", refused))
    before = workshop.contents()
    with pytest.raises(MappingBusyError):
        workshop.migrate("encrypted", recovery_file=workshop.recovery)
    assert set(workshop.contents()) == set(before)


def test_a_partition_table_that_is_replaced_after_the_plan_was_made_is_not_changed(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = migration_workshop
    medium = workshop.made()

    def repartition() -> None:
        with medium.open("r+b") as file:
            identity = gpt.Identity("another", marked_partition.LINUX_DATA, uuid4())
            gpt.make(file.fileno(), str(medium), identity)

    while_read(monkeypatch, repartition)
    with pytest.raises(HotplugError, match="its partition table was changed meanwhile; try again"):
        workshop.migrate("encrypted", recovery_file=workshop.recovery)
    assert workshop.identity(medium).name == "another"
    assert not workshop.recovery.exists()
    assert list(migration_journal.heads(workshop.blobs)) == []


def test_the_disk_is_under_a_mapping_while_all_of_it_is_read(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop = migration_workshop
    workshop.made()
    through_key, opened, seen = temporary_mapping.through_key, [], []

    @contextmanager
    def watched(hold: Any, purpose: Any, entry: Any, **more: Any) -> Iterator[Mapping]:
        with through_key(hold, purpose, entry, **more) as mapping:
            opened.append(purpose)
            yield mapping
            opened.remove(purpose)

    monkeypatch.setattr(temporary_mapping, "through_key", watched)
    while_read(monkeypatch, lambda: seen.append(list(opened)))
    workshop.plan_migration("trusted")
    assert (seen, opened) == ([["migrate-from"]], [])


def test_a_plan_is_not_carried_out_on_another_disk(
    migration_workshop: MigrationWorkshop,
) -> None:
    workshop = migration_workshop
    workshop.made()
    plan = workshop.plan_migration("trusted")
    other = workshop.medium("other.img")
    with (
        disks.held(disk_of(other)) as hold,
        pytest.raises(HotplugError, match="the plan was made for another disk"),
    ):
        migrate.carry_out(plan, hold, nothing)
