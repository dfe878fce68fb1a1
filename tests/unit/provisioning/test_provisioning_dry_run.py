"""`--dry-run` of `provision` and `migrate`: every check is done, and nothing is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.cli.main import main
from caam_hotplug.kernel import gpt, mkfs, trusted
from caam_hotplug.keys import backends, store
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.provisioning import temporary_mapping
from caam_hotplug.provisioning.migration_plan import NewKey
from caam_hotplug.provisioning.migration_stage import Begun
from unit.provisioning.test_provision import ALL, cut_at
from unit.workshop import LABEL, MigrationWorkshop, Workshop, disk_of


def unchanged(workshop: Workshop, medium: Path, **more: Any) -> list[str]:
    """The lines of a dry run, which changes neither the medium nor any file."""
    before = workshop.contents()
    lines = list(workshop.plan(medium, **more).lines())
    assert workshop.contents() == before
    return lines


def test_a_blank_mediums_plan_names_everything_that_would_be_written(workshop: Workshop) -> None:
    medium, file = workshop.medium(), workshop.drop_in(f"{LABEL}.toml")
    node = f"/dev/{disk_of(medium).name}"
    assert unchanged(workshop, medium, recovery_file=workshop.recovery, rule_file=file) == [
        f"{node}: {LABEL} would be made in these steps:",
        f"- make a key of 16 bytes, and write it to {workshop.recovery}",
        f"- seal the key as a tagged key, and write {workshop.blob}",
        f"- erase {node}, which looks blank",
        "- write a partition table with one partition, marked as not finished",
        "- make the filesystem ext4, encrypted with capi:tk(cbc(aes))-plain in sectors of 512 "
        "bytes",
        f"- write the rule to {file}",
        "- have a running agent read the rules",
        f"- write the label {LABEL} to the partition table",
    ]


def test_a_plan_says_what_would_be_erased(workshop: Workshop) -> None:
    workshop.make(medium := workshop.medium())
    disk = disk_of(medium)
    lines = unchanged(workshop, medium, label="other", erase=disk.name)
    assert f"- erase /dev/{disk.name}, which holds a partition table (gpt)" in lines


STAGES = {
    "only the recovery file was written": ((backends, "seal"), False),
    "the blob was written": ((gpt, "make"), False),
    "the medium was marked": ((store, "settle_recovery"), True),
    "the filesystem was not made": ((mkfs, "make"), True),
}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_mediums_plan_has_only_the_steps_that_are_left(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    medium, file = workshop.medium(), workshop.recovery
    where, is_begun = STAGES[stage]
    cut_at(monkeypatch, where, workshop, medium, recovery_file=file)
    lines = unchanged(workshop, medium, recovery_file=file)
    assert lines[0].endswith("was begun before, and would be finished in these steps:") is is_begun
    assert (f"- read the key from {file}" in lines) is not is_begun
    assert any(line.startswith("- erase ") for line in lines) is not is_begun
    discards = f"- remove {workshop.blob}, which an interrupted run made for no medium"
    assert (discards in lines) is (stage == "the blob was written")
    if discards in lines:  # in the order in which it is done
        read = f"- read the key from {file}"
        seal = f"- seal the key as a tagged key, and write {workshop.blob}"
        assert [line for line in lines if line in {read, discards, seal}] == [read, discards, seal]
    assert any(line.startswith("- make the filesystem ext4") for line in lines)
    assert workshop.make(medium, recovery_file=file).was_made_before is False


def test_a_finished_mediums_plan_writes_its_label_alone(workshop: Workshop) -> None:
    workshop.make(medium := workshop.medium())
    assert unchanged(workshop, medium) == [
        f"/dev/{disk_of(medium).name}: {LABEL} was made before; its key is in {workshop.blob}. "
        "Steps:",
        f"- write the label {LABEL} to the partition table",
    ]


def test_the_command_prints_the_plan_and_exits_with_0(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    medium = workshop.medium()
    before = workshop.contents()
    command = ["provision", str(medium), "--label", LABEL, "--config", str(workshop.config_file)]
    assert main([*command, "--backend", "tagged", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"/dev/{disk_of(medium).name}: {LABEL} would be made in these")
    assert shown.out.endswith("\nnothing was changed\n")
    assert workshop.contents() == before
    assert main([*command, "--backend", "tagged"]) == 0
    assert capsys.readouterr().err == shown.err == ""


def test_a_refused_dry_run_exits_with_1(
    workshop: Workshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop.make(medium := workshop.medium())
    command = ["provision", str(medium), "--label", "x", "--config", str(workshop.config_file)]
    assert main([*command, "--backend", "tagged", "--dry-run"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "it holds a partition table (gpt); if all of it may be lost" in shown.err


def test_a_migrations_plan_names_everything_that_would_be_written(
    migration_workshop: MigrationWorkshop, capsys: pytest.CaptureFixture[str]
) -> None:
    workshop, medium = migration_workshop, migration_workshop.made()
    before = workshop.contents()
    command = ["migrate", LABEL, "--config", str(workshop.config_file), "--dry-run"]
    assert main([*command, "--to", "trusted"]) == 0
    node = workshop.partition.node
    assert capsys.readouterr().out.splitlines() == [
        f"{node}: {LABEL} would move from a tagged key to a trusted key in these steps:",
        "- make a key of 64 bytes",
        "- seal the key as a trusted key",
        f"- write a journal to {workshop.blobs}, with both blobs",
        "- mark the partition as not finished",
        "- encrypt all 23 MB anew: capi:tk(cbc(aes))-plain to aes-xts-plain64, sector_size 512, "
        "offset 0, iv_offset 0, flags []",
        f"- keep the old blob as {workshop.blob}.tagged",
        f"- write the new blob to {workshop.blob}",
        f"- give the partition its label {LABEL} and its type back",
        "- remove the journal",
        "nothing was changed",
    ]
    assert workshop.contents() == before
    assert workshop.identity(medium).name == LABEL


def test_a_dry_run_has_the_notes_of_the_real_run(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    workshop, medium = migration_workshop, migration_workshop.medium()
    # As of a TPM: the blob does not have its key's length.
    monkeypatch.setattr(trusted, "seal_trusted", lambda *_: bytes(213).hex().encode())
    workshop.drop_in("all.toml", ALL)
    more = {"method": SealMethod(backend="trusted"), "key_bytes": 64, "cipher": "aes-xts-plain64"}
    planned = workshop.plan(medium, **more)
    assert planned.notes == workshop.make(medium, **more).notes
    assert "the medium has another key.length;" in planned.notes[0]


@pytest.mark.parametrize("command", ["provision", "migrate"])
def test_a_dry_run_removes_no_leftover_mapping_and_the_next_real_run_does(
    migration_workshop: MigrationWorkshop, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    workshop, medium = migration_workshop, migration_workshop.made()
    called: list[str] = []
    for name in ("remove_leftovers", "require_no_leftovers"):
        monkeypatch.setattr(temporary_mapping, name, lambda _disk, name=name: called.append(name))
    if command == "provision":
        workshop.plan(medium)
        workshop.make(medium)
    else:
        workshop.plan_migration("trusted")
        workshop.migrate("trusted")
    assert called == ["require_no_leftovers", "remove_leftovers"]


def test_a_plan_has_the_right_article_for_every_kind_of_key(
    migration_workshop: MigrationWorkshop,
) -> None:
    workshop = migration_workshop
    workshop.made()
    planned = list(workshop.plan_migration("encrypted").lines())
    assert planned[0].endswith("would move from a tagged key to an encrypted key in these steps:")
    assert "- seal the key as an encrypted key" in planned
    workshop.migrate("encrypted")
    (done,) = workshop.plan_migration("encrypted").lines()
    assert done.endswith(f"{LABEL} has an encrypted key already")


def test_a_migration_to_the_key_that_the_medium_has_plans_nothing(
    migration_workshop: MigrationWorkshop,
) -> None:
    migration_workshop.made()
    before = migration_workshop.contents()
    plan = migration_workshop.plan_migration("tagged")
    assert plan.work is None
    assert list(plan.lines()) == [
        f"{migration_workshop.partition.node}: {LABEL} has a tagged key already"
    ]
    assert migration_workshop.contents() == before


def test_a_journal_of_a_run_that_did_not_touch_the_medium_is_removed_by_the_next_run_alone(
    migration_workshop: MigrationWorkshop,
) -> None:
    migration_workshop.made()
    journal = migration_workshop.journal()
    before = migration_workshop.contents()
    plan = migration_workshop.plan_migration("trusted")
    assert migration_workshop.contents() == before
    assert isinstance(plan.work, NewKey)
    removed = f"- remove {journal}, of a run that did not touch the medium"
    assert list(plan.lines())[1] == removed


def test_a_marked_mediums_plan_says_how_far_the_journal_is(
    migration_workshop: MigrationWorkshop,
) -> None:
    migration_workshop.made()
    journal = migration_workshop.journal(moved_bytes=5 << 20)
    before = migration_workshop.contents()
    plan = migration_workshop.plan_migration("trusted")
    assert migration_workshop.contents() == before
    assert isinstance(plan.work, Begun)
    lines = list(plan.lines())
    assert lines[0].endswith(f"{LABEL} was begun before, and would be finished in these steps:")
    assert lines[1] == f"- go on by {journal}: 5 of 23 MB are under the new key"
