"""What `migrate` does when board or medium change between plan and act; on images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from uuid import uuid4

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.keys import store
from caam_hotplug.provisioning import medium_blocks, migration_journal
from caam_hotplug.provisioning.migration_journal import Head
from caam_hotplug.provisioning.reencryption import Record
from unit.workshop import LABEL, MigrationWorkshop

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
