"""What `provision` makes, goes on with, and refuses; on images, see `workshop`."""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.formats import recovery_files
from caam_hotplug.kernel import atomic_files, disks, gpt, mkfs, system_partitions
from caam_hotplug.keys import backends, store
from caam_hotplug.keys.backends import SealMethod
from caam_hotplug.model import SecretBytes
from caam_hotplug.provisioning import provision
from unit.workshop import LABEL, Workshop, disk_of


def refusal(workshop: Workshop, medium: Path, **more: object) -> str:
    """Return the message of a command that changes nothing, dry or not."""

    before = workshop.contents()
    with pytest.raises(HotplugError) as planned:
        workshop.plan(medium, **more)
    with pytest.raises(HotplugError) as refused:
        workshop.make(medium, **more)
    assert workshop.contents() == before
    assert str(planned.value) == str(refused.value)
    return str(refused.value)


def test_a_recovery_key_is_the_mediums_and_is_reported(workshop: Workshop) -> None:
    made = workshop.make(workshop.medium(), recovery_file=workshop.recovery)
    assert (made.recovery_file, made.was_made_before) == (workshop.recovery, False)
    encoded = workshop.recovery.read_text().rpartition("key = ")[2]
    assert base64.b64decode(encoded) == workshop.key()


def test_the_headers_of_an_earlier_use_are_wiped(workshop: Workshop) -> None:
    medium = workshop.medium()
    size = medium.stat().st_size
    with medium.open("r+b") as file:
        file.write(b"\xaa" * size)
    workshop.make(medium)
    with medium.open("rb") as file:
        (entry,) = gpt.read(file.fileno(), str(medium)) or ()
        first, length = entry.start * 512, entry.length * 512
        for position in (first, first + length - (128 << 10)):
            file.seek(position)
            assert file.read(128 << 10) == bytes(128 << 10)
        file.seek(first + length // 2)
        assert file.read(512) == b"\xaa" * 512


def test_a_medium_that_was_made_gets_no_recovery_key_later(workshop: Workshop) -> None:
    workshop.make(medium := workshop.medium())
    said = refusal(workshop, medium, recovery_file=workshop.recovery)
    assert f"it was made before, {workshop.recovery} is not there" in said
    assert "leave out --recovery-key, or make it anew under another label" in said
    assert not workshop.recovery.exists()


def test_a_recovery_file_of_a_medium_that_was_made_is_not_vouched_for(workshop: Workshop) -> None:
    workshop.make(medium := workshop.medium(), recovery_file=workshop.recovery)
    made = workshop.make(medium, recovery_file=workshop.recovery)
    assert (made.was_made_before, made.recovery_file) == (True, None)
    assert f"{workshop.recovery} was there before; whether its key is the medium's" in made.notes[0]


@pytest.mark.parametrize(
    "more", [{"key_bytes": 32}, {"method": SealMethod(backend="tagged", seal="ccm")}]
)
def test_a_medium_that_was_made_is_not_taken_for_one_of_other_options(
    workshop: Workshop, more: dict[str, object]
) -> None:
    workshop.make(medium := workshop.medium())
    said = refusal(workshop, medium, **more)
    assert "it was made with --backend tagged --key-bytes 16 --seal ecb, not with " in said


class PowerCutError(Exception):
    """The run ends here, with nothing taken back."""


def cut(*_arguments: object, **_more: object) -> None:
    raise PowerCutError


def cut_at(
    monkeypatch: pytest.MonkeyPatch,
    where: tuple[object, str],
    workshop: Workshop,
    medium: Path,
    **more: object,
) -> None:
    """The command is cut where this function is called."""
    with monkeypatch.context() as cutting, pytest.raises(PowerCutError):
        cutting.setattr(*where, cut)
        workshop.make(medium, **more)


CUTS = {
    "the key is in its file": (backends, "seal"),
    "the blob is there": (gpt, "make"),
    "the medium is marked": (atomic_files, "settle"),
    "the blob is settled": (store, "settle_recovery"),
    "the filesystem is made": (mkfs, "make"),
    "the label is written": (gpt, "rename"),
}


@pytest.mark.parametrize("when", CUTS)
def test_cut_as_soon_as_anything_is_done_the_same_command_completes_it_with_its_recovery_key(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    medium, file = workshop.medium(), workshop.recovery
    cut_at(monkeypatch, CUTS[when], workshop, medium, recovery_file=file)
    written = file.read_bytes()
    made = workshop.make(medium, recovery_file=file)
    assert (made.recovery_file, file.read_bytes()) == (file, written)
    assert base64.b64decode(file.read_text().rpartition("key = ")[2]) == workshop.key()
    used = f"the key is that in {file}, of a run that was interrupted"
    assert (used in made.notes) is (when in {"the key is in its file", "the blob is there"})
    assert {p.name for p in workshop.folder.iterdir() if p.name.startswith(".")} == set()
    assert [p.name for p in workshop.blobs.iterdir()] == [workshop.blob.name]


def planted(workshop: Workshop, file: Path) -> None:
    """A recovery file of the label that somebody has put there, who knows the key."""
    about = recovery_files.About(LABEL, "capi:tk(cbc(aes))-plain", 512, "ext4", "planted")
    head = recovery_files.head(about, file.name, 16)
    file.write_bytes(head + b"key = " + base64.b64encode(b"0123456789abcdef") + b"\n")
    file.chmod(0o600)
    workshop.blobs.mkdir(mode=0o700, exist_ok=True)


def test_the_key_of_a_file_that_no_run_has_left_is_not_used(workshop: Workshop) -> None:
    planted(workshop, workshop.recovery)
    said = refusal(workshop, workshop.medium(), recovery_file=workshop.recovery)
    assert f"write {workshop.recovery}: it exists, and is not of a run that was" in said


@pytest.mark.parametrize("fault", ["owner", "mode", "link"])
def test_a_recovery_file_that_is_not_roots_alone_is_refused_however_it_came(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    medium, file = workshop.medium(), workshop.recovery
    cut_at(monkeypatch, (backends, "seal"), workshop, medium, recovery_file=file)
    if fault == "owner":
        os.chown(file, 1000, 0)
    elif fault == "mode":
        file.chmod(0o640)
    else:
        file.rename(workshop.folder / "elsewhere")
        file.symlink_to("elsewhere")
    said = refusal(workshop, medium, recovery_file=file)
    words = "it is a symbolic link; name" if fault == "link" else "others than root can read it"
    assert f"read {file}: " in said
    assert words in said


def test_a_medium_that_was_begun_goes_on_with_its_own_blob_only(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = workshop.medium("begun.img")
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun)
    workshop.blob.unlink()
    workshop.make(workshop.medium("another.img"))
    said = refusal(workshop, begun)
    assert "a medium that is not finished, begun with another label, key or recovery file" in said


def test_a_medium_that_was_begun_with_a_recovery_file_goes_on_with_its_own_blob_only(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, file = workshop.medium("begun.img"), workshop.recovery
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun, recovery_file=file)
    workshop.blob.unlink()
    workshop.make(workshop.medium("another.img"))
    assert "begun with another label, key" in refusal(workshop, begun, recovery_file=file)


def test_a_medium_that_was_begun_and_lost_its_blob_is_begun_anew_if_it_may_be_erased(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = workshop.medium()
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun)
    workshop.blob.unlink()
    assert "a medium that is not finished" in refusal(workshop, begun)
    workshop.make(begun, erase=disk_of(begun).name)
    assert workshop.identity(begun).name == LABEL


def test_a_medium_that_was_begun_says_with_which_options(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = workshop.medium()
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun)
    anew = f"remove {workshop.blob} and add --erase {disk_of(begun).name} to begin anew"
    said = refusal(workshop, begun, key_bytes=32)
    assert "it was begun with --backend tagged --key-bytes 16 --seal ecb, not with" in said
    assert said.endswith(anew)
    said = refusal(workshop, begun, recovery_file=workshop.recovery)
    assert f"it was begun without {workshop.recovery}" in said
    assert said.endswith(anew)


def once_planned(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Something happens between the plan and its first step."""
    carry_out = provision.carry_out

    def later(*arguments: Any) -> provision.ProvisionResult:
        act()
        return carry_out(*arguments)

    monkeypatch.setattr(provision, "carry_out", later)


def test_a_blob_that_is_replaced_after_the_plan_was_made_is_not_used(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = workshop.medium()
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun)
    other = bytearray(workshop.blob.read_bytes())
    other[30] ^= 1
    once_planned(monkeypatch, lambda: workshop.blob.write_bytes(other))
    before = begun.read_bytes()
    with pytest.raises(HotplugError, match="its key was replaced meanwhile; try again"):
        workshop.make(begun)
    assert begun.read_bytes() == before


def test_a_recovery_file_that_is_replaced_after_the_plan_was_made_is_not_used(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, file = workshop.medium(), workshop.recovery
    cut_at(monkeypatch, (backends, "seal"), workshop, medium, recovery_file=file)

    once_planned(monkeypatch, lambda: (file.unlink(), planted(workshop, file)))
    before = medium.read_bytes()
    with pytest.raises(HotplugError, match=f"use {file}: it was replaced meanwhile; try again"):
        workshop.make(medium, recovery_file=file)
    assert (medium.read_bytes(), list(workshop.blobs.iterdir())) == (before, [])


def test_files_that_appear_after_the_plan_was_made_are_not_overwritten(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, rule = workshop.medium(), workshop.drop_in(f"{LABEL}.toml")

    def appears(file: Path) -> None:
        file.parent.mkdir(mode=0o700, exist_ok=True)
        file.write_bytes(b"whatever it is")

    for file in (workshop.blob, workshop.recovery, rule):
        with monkeypatch.context() as planning:
            once_planned(planning, partial(appears, file))
            with pytest.raises(HotplugError, match=f"{file}:? (it )?exists,? and "):
                workshop.make(medium, recovery_file=workshop.recovery, rule_file=rule)
        assert file.read_bytes() == b"whatever it is"
        file.unlink()
    workshop.make(medium, recovery_file=workshop.recovery, rule_file=rule)
    assert workshop.identity(medium).name == LABEL


@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_begun_medium_is_not_finished_if_its_recovery_file_changes_after_the_plan_was_made(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, is_replaced: bool
) -> None:
    begun, file = workshop.medium(), workshop.recovery
    cut_at(monkeypatch, (mkfs, "make"), workshop, begun, recovery_file=file)

    def changes() -> None:
        file.unlink()
        if is_replaced:
            planted(workshop, file)

    once_planned(monkeypatch, changes)
    before = begun.read_bytes()
    with pytest.raises(HotplugError, match="its key was replaced meanwhile; try again"):
        workshop.make(begun, recovery_file=file)
    assert begun.read_bytes() == before


def test_a_rule_that_is_removed_after_the_plan_was_made_is_written_again(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, rule = workshop.medium(), workshop.drop_in(f"{LABEL}.toml")
    workshop.make(medium, rule_file=rule)
    text = rule.read_text()
    once_planned(monkeypatch, rule.unlink)
    workshop.make(medium, rule_file=rule)
    assert rule.read_text() == text


def test_a_medium_gets_no_label_if_its_rule_is_replaced_after_the_plan_was_made(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, rule = workshop.medium(), workshop.drop_in(f"{LABEL}.toml")
    cut_at(monkeypatch, (gpt, "rename"), workshop, medium, rule_file=rule)
    once_planned(monkeypatch, lambda: rule.write_text("another rule"))
    with pytest.raises(HotplugError, match="it exists and says something else"):
        workshop.make(medium, rule_file=rule)
    assert (rule.read_text(), workshop.identity(medium).name == LABEL) == ("another rule", False)


def test_the_same_rule_may_appear_after_the_plan_was_made(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, rule = workshop.medium(), workshop.drop_in(f"{LABEL}.toml")
    text = workshop.options(medium).rule_text
    once_planned(monkeypatch, lambda: workshop.drop_in(rule.name, text))
    workshop.make(medium, rule_file=rule)
    assert (rule.read_text(), workshop.identity(medium).name) == (text, LABEL)


def test_the_key_is_wiped_before_its_blob_is_written(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    medium, file, seal = workshop.medium(), workshop.recovery, backends.seal
    cut_at(monkeypatch, (gpt, "make"), workshop, medium, recovery_file=file)
    keys: list[SecretBytes] = []
    wiped: dict[str, bool] = {}

    def sealing(method: SealMethod, key: int | SecretBytes, directory: Path) -> bytes:
        if not isinstance(key, int):
            keys.append(key)
        return seal(method, key, directory)

    def watch(name: str) -> None:
        real = getattr(store.Folder, name)

        def watched(*arguments: Any, **more: Any) -> None:
            wiped[name] = all(not any(key.buffer) for key in keys)
            real(*arguments, **more)

        monkeypatch.setattr(store.Folder, name, watched)

    monkeypatch.setattr(backends, "seal", sealing)
    watch("discard_unsettled")
    watch("write")
    workshop.make(medium, recovery_file=file)
    assert keys
    assert wiped == {"discard_unsettled": True, "write": True}


def test_a_plan_is_not_carried_out_on_another_disk(workshop: Workshop) -> None:
    plan = workshop.plan(workshop.medium())
    other = workshop.medium("other.img")
    before = other.read_bytes()
    with (
        disks.held(disk_of(other)) as hold,
        pytest.raises(HotplugError, match="the plan was made for another disk"),
    ):
        provision.carry_out(plan, hold, workshop.steps.append, workshop.announce)
    assert (other.read_bytes(), workshop.blobs.exists()) == (before, False)


@pytest.mark.parametrize("text", ["# another rule\n", ""])
def test_a_rule_that_cannot_be_written_is_refused_before_the_disk_is_touched(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    medium, rule = workshop.medium(), workshop.drop_in(f"{LABEL}.toml", text)
    if not text:
        workshop.drop_in("same.toml", ALL.replace("others", LABEL))
    monkeypatch.setattr(disks, "held", cut)
    said = refusal(workshop, medium, rule_file=rule)
    assert said.startswith(f"write {rule}: ")


ALL = '[[rule]]\nname = "others"\nmatch = { partlabel = "*" }\n'
DECIDING = {
    "cipher": ("and would not open the medium, which has another cipher;", ALL),
    "blob": ("which has another blob;", ALL + 'key = { blob = "all.bb" }\n'),
    "ignore": ("and its action is ignore;", ALL + 'action = "ignore"\n'),
}
PLAIN64 = "capi:tk(cbc(aes))-plain64"


@pytest.mark.parametrize("why", DECIDING)
def test_a_rule_that_would_never_decide_is_not_written(workshop: Workshop, why: str) -> None:
    words, text = DECIDING[why]
    cipher = {"cipher": PLAIN64} if why == "cipher" else {}
    workshop.drop_in("10-all.toml", text)
    file = workshop.drop_in(f"{LABEL}.toml")
    said = refusal(workshop, workshop.medium(), rule_file=file, **cipher)
    assert said.startswith(f"write {file}: rule 'others' is asked before it ")
    assert words in said


def test_a_rule_that_is_asked_first_or_opens_the_medium_too_is_no_hindrance(
    workshop: Workshop,
) -> None:
    file = workshop.drop_in(f"{LABEL}.toml")
    workshop.drop_in("x-all.toml", ALL)
    workshop.make(workshop.medium(), rule_file=file, cipher=PLAIN64)
    assert PLAIN64 in file.read_text()
    workshop.drop_in("10-all.toml", ALL.replace("others", "all"))
    same = workshop.drop_in("plain.toml")
    workshop.make(workshop.medium("other.img"), rule_file=same, label="plain")
    assert same.exists()


def test_a_label_by_which_the_system_finds_its_root_is_refused(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system_partitions, "_COMMAND_LINE", workshop.folder / "cmdline")
    (workshop.folder / "cmdline").write_text(f"root=PARTLABEL={LABEL} ro\n")
    said = refusal(workshop, workshop.medium())
    assert said.startswith(f"use label '{LABEL}': the system has it: the kernel's command line has")
