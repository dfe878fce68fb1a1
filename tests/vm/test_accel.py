"""KVM is used where a guest answers on it, and a machine where none does waits only so long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from vm import accel, image, machine

ANSWERS = ("sh", "-c", 'echo "BusyBox v1.35" >"${1#file:}"; exec sleep 60')
"""In place of QEMU: its last argument says where the console goes."""
HANGS = ("sh", "-c", "exec sleep infinity")
ENDS = ("sh", "-c", "exit 134")
KERNEL = Path("vmlinuz")
INITRD = Path("initrd")


@pytest.fixture
def tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """The commands by which a guest was tried on KVM, of which none says anything."""
    commands: list[list[str]] = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "caam-hotplug").mkdir()
    monkeypatch.setattr(accel, "DEVICE", tmp_path)  # the user of this run may use it
    monkeypatch.setattr(accel, "answers", lambda command: bool(commands.append(command)))
    monkeypatch.delenv("ACCEL", raising=False)
    accel.chosen.cache_clear()
    yield commands
    accel.chosen.cache_clear()


def chosen_anew() -> str:
    """What another process finds."""
    accel.chosen.cache_clear()
    return accel.chosen(KERNEL, INITRD)


def test_a_guest_that_says_something_answers() -> None:
    assert accel.answers(ANSWERS)


def test_a_guest_that_never_says_anything_is_given_up_at_the_deadline() -> None:
    assert not accel.answers(HANGS, deadline_s=0.2)


def test_a_guest_whose_qemu_gives_up_is_not_waited_for() -> None:
    assert not accel.answers(ENDS, deadline_s=float("inf"))


def test_kvm_is_tried_once_until_the_machine_is_booted_anew(
    tried: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [chosen_anew() for _ in range(3)] == ["tcg"] * 3
    assert len(tried) == 1
    boot = tmp_path / "boot_id"
    boot.write_text("another boot\n")
    monkeypatch.setattr(accel, "_BOOT", boot)
    monkeypatch.setattr(accel, "answers", lambda _command: True)
    assert [chosen_anew() for _ in range(2)] == ["kvm"] * 2


def test_a_machine_without_kvm_is_not_asked(
    tried: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accel, "DEVICE", tmp_path / "kvm")
    assert (chosen_anew(), tried) == ("tcg", [])


@pytest.mark.parametrize("wanted", ["kvm", "tcg"])
def test_the_accelerator_that_the_user_names_is_taken(
    tried: list[list[str]], monkeypatch: pytest.MonkeyPatch, wanted: str
) -> None:
    monkeypatch.setenv("ACCEL", wanted)
    assert (chosen_anew(), tried) == (wanted, [])


def test_a_word_that_is_none_of_them_is_refused(
    tried: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCEL", "hvf")
    with pytest.raises(ValueError, match="ACCEL is 'hvf'"):
        chosen_anew()


def test_a_state_that_one_saved_is_not_found_by_the_other() -> None:
    made = image.Image(KERNEL, INITRD, Path("base"), Path("bed"), "key")
    assert machine.state_key(made, "kvm", b"QEMU") != machine.state_key(made, "tcg", b"QEMU")
