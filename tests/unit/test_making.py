"""What `provision` makes, goes on with, and refuses; on images, see `workshop`."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.sealing import Way
from unit.workshop import Workshop


def refusal(workshop: Workshop, medium: Path, **more: object) -> str:
    """What is said of a command that changes neither the medium nor the keys."""

    def files() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in workshop.folder.rglob("*") if p.is_file()}

    before = files()
    with pytest.raises(HotplugError) as refused:
        workshop.make(medium, **more)
    assert files() == before
    return str(refused.value)


def test_a_recovery_key_is_the_mediums_and_is_told_of(workshop: Workshop) -> None:
    made = workshop.make(workshop.medium(), recovery_file=workshop.recovery)
    assert (made.recovery_file, made.was_made_before) == (workshop.recovery, False)
    encoded = workshop.recovery.read_text().rpartition("key = ")[2]
    assert base64.b64decode(encoded) == workshop.key()


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


@pytest.mark.parametrize("more", [{"key_bytes": 32}, {"way": Way(backend="tagged", seal="ccm")}])
def test_a_medium_that_was_made_is_not_taken_for_one_of_other_options(
    workshop: Workshop, more: dict[str, object]
) -> None:
    workshop.make(medium := workshop.medium())
    said = refusal(workshop, medium, **more)
    assert "it was made with --backend tagged --key-bytes 16 --seal ecb, not with " in said
