"""Nothing is reported while nothing happens; the guest's tests change mounts."""

from __future__ import annotations

import select
from contextlib import closing

import pytest

from caam_hotplug.errors import UnknownError
from caam_hotplug.kernel import mount_events
from caam_hotplug.kernel.mount_events import MountEvents


def test_nothing_is_readable_while_nothing_happens() -> None:
    with closing(MountEvents()) as events:
        assert select.select([events], [], [], 0)[0] == []
        events.read()
        assert select.select([events], [], [], 0)[0] == []


def test_mounts_that_cannot_be_watched_are_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mount_events, "_MOUNTINFO", "/proc/self/nowhere")
    with pytest.raises(UnknownError, match="watch /proc/self/nowhere: No such file or directory"):
        MountEvents()
