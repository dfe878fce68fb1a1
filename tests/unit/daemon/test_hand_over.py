"""A stop hands media over at an upgrade and a restart, and nothing that fails delays it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from caam_hotplug import names
from caam_hotplug.daemon import hand_over
from caam_hotplug.dbus import systemd_units


@pytest.fixture
def mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The mark's path, in a folder of the test's."""
    made = tmp_path / "hand-over"
    monkeypatch.setattr(names, "HAND_OVER", made)
    return made


def asked_for(monkeypatch: pytest.MonkeyPatch, job: str) -> bool:
    async def own_job(_within_s: float) -> str:
        return job

    monkeypatch.setattr(systemd_units, "own_job", own_job)
    return asyncio.run(hand_over.is_asked_for())


@pytest.mark.parametrize(
    ("job", "is_so"), [("restart", True), ("try-restart", True), ("stop", False), ("", False)]
)
def test_a_restart_is_one_and_a_stop_is_none(
    mark: Path, monkeypatch: pytest.MonkeyPatch, job: str, is_so: bool
) -> None:
    assert asked_for(monkeypatch, job) is is_so


def test_the_stop_of_an_upgrade_is_one_until_the_next_start(
    mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark.touch()
    assert asked_for(monkeypatch, "stop")
    hand_over.forget()
    hand_over.forget()
    assert not asked_for(monkeypatch, "stop")


def test_a_mark_that_cannot_be_removed_is_said(
    mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark.mkdir()
    hand_over.forget()
    assert "media stay mounted at each stop" in caplog.text
