"""A stop hands media over at an upgrade and a restart, and never while the machine goes down."""

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


def keeps(monkeypatch: pytest.MonkeyPatch, job: str) -> bool | None:
    async def own_job(_within_s: float) -> str:
        return job

    monkeypatch.setattr(systemd_units, "own_job", own_job)
    return asyncio.run(hand_over.keeps_media())


@pytest.mark.parametrize(
    ("job", "kept"),
    [("restart", True), ("try-restart", True), ("stop", None), ("", None), ("shutdown", False)],
)
def test_a_restart_keeps_media_and_the_rules_say_it_of_a_stop(
    mark: Path, monkeypatch: pytest.MonkeyPatch, job: str, kept: bool | None
) -> None:
    assert keeps(monkeypatch, job) is kept


def test_the_stop_of_an_upgrade_keeps_media_until_the_next_start(
    mark: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark.touch()
    assert keeps(monkeypatch, "stop")
    assert keeps(monkeypatch, "")
    assert keeps(monkeypatch, "shutdown") is False
    hand_over.forget()
    hand_over.forget()
    assert keeps(monkeypatch, "stop") is None


def test_a_mark_that_cannot_be_removed_is_said(
    mark: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mark.mkdir()
    hand_over.forget()
    assert "media stay mounted at each stop" in caplog.text
