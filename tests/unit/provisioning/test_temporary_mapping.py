from __future__ import annotations

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import devmapper
from caam_hotplug.model import DeviceNumber, Mapping
from caam_hotplug.provisioning.temporary_mapping import require_no_leftovers
from unit.provisioning.asked import DISK

LEFTOVER = Mapping("caam-hotplug-x", "CAAM-COMMAND-migrate-to-9", DeviceNumber(253, 0), (), 0)


def test_a_leftover_mapping_is_named_with_how_to_remove_it_and_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    removed: list[str] = []
    monkeypatch.setattr(devmapper, "remove", removed.append)
    monkeypatch.setattr(devmapper, "find", {LEFTOVER.uuid: LEFTOVER}.get)
    with pytest.raises(HotplugError, match="`dmsetup remove caam-hotplug-x` removes it"):
        require_no_leftovers(DISK)
    assert removed == []


def test_a_disk_without_leftover_mappings_may_be_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devmapper, "find", lambda _uuid: None)
    require_no_leftovers(DISK)
