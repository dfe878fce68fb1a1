"""Who has a device open is asked of those who can see it; what nobody saw is not known."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from caam_hotplug import names
from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import open_files
from caam_hotplug.model import DeviceNumber, Holder

DISK = {DeviceNumber(8, 0): "/dev/sda"}
_SYS_PTRACE = 1 << 19


@pytest.fixture(autouse=True)
def nobody_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(names, "HOLDERS_SOCKET", tmp_path / "holders")
    monkeypatch.setattr(open_files, "search", lambda _: [])


def have_capabilities(monkeypatch: pytest.MonkeyPatch, proc: Path, effective: int) -> None:
    own = proc / "self"
    own.mkdir()
    (own / "status").write_text(f"Name:\tcaam-hotplug\nCapEff:\t{effective:016x}\nSeccomp:\t2\n")
    monkeypatch.setattr(open_files, "_PROC", proc)


def test_a_process_that_cannot_see_into_others_knows_of_no_opener_by_itself(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    have_capabilities(monkeypatch, tmp_path, ~_SYS_PTRACE & (1 << 41) - 1)
    with pytest.raises(UnknownError, match=r"^look who has open /dev/sda: .*nobody answers at /"):
        open_files.openers(DISK, of_all=True)
    assert open_files.openers(DISK) == []


def test_a_process_that_sees_into_others_needs_no_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    have_capabilities(monkeypatch, tmp_path, _SYS_PTRACE)
    assert open_files.openers(DISK, of_all=True) == []


@pytest.mark.parametrize("of_all", [True, False])
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
def test_at_the_limit_of_open_files_nobody_is_known_to_have_it_open_or_not(
    monkeypatch: pytest.MonkeyPatch, number: int, *, of_all: bool
) -> None:
    def none_left(_: object) -> list[Holder]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(open_files, "_asked", none_left)
    with pytest.raises(UnknownError, match=r"^look who has open /dev/sda: Too many open files"):
        open_files.openers(DISK, of_all=of_all)
