"""The commands before and after a sleep, with a device-mapper and an agent of the test's own."""

from __future__ import annotations

from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from caam_hotplug.cli import main as cli
from caam_hotplug.cli import sleep
from caam_hotplug.dbus import client
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import devmapper
from caam_hotplug.model import DeviceNumber, Mapping

TAGGED = "0 8 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:{} 0 8:1 0"
TRUSTED = "0 8 crypt aes-xts-plain64 :32:trusted:caam-hotplug:{} 0 8:1 0"


class Machine:
    """Mappings, and an agent that removes one when it locks its volume."""

    def __init__(self) -> None:
        self.mappings: dict[str, str] = {}
        """Tables by DM-UUID."""
        self.busy: set[str] = set()
        self.asked: list[str] = []
        self.has_agent = True

    def ours(self, prefix: str) -> list[Mapping]:
        number = DeviceNumber(253, 0)
        return [
            Mapping(f"caam-x-{uuid}", uuid, number, (table,), 1)
            for uuid, table in self.mappings.items()
            if uuid.startswith(prefix)
        ]

    def run(self, _what: str, work: Coroutine[Any, Any, None]) -> None:
        if not self.has_agent:
            raise client.NotRunningError("the agent does not run")
        with pytest.raises(StopIteration):
            work(self).send(None)  # type: ignore[operator]

    async def change(self, volume: client.RemoteVolume, method: str) -> None:
        which = volume.path.rpartition("/")[2].replace("_", "-")
        self.asked.append(f"{method} {which}")
        if which in self.busy:
            raise HotplugError(f"{which} is in use: pid 7 (writer)")
        if method == "Lock":
            del self.mappings[f"CAAM-HOTPLUG-{which}"]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Machine:
    made = Machine()
    monkeypatch.setattr(devmapper, "ours", made.ours)
    monkeypatch.setattr(sleep, "LOCKED", tmp_path / "locked")
    monkeypatch.setattr(client, "run", made.run)
    return made


def test_nobody_is_asked_if_no_key_would_be_lost(machine: Machine) -> None:
    machine.mappings = {"CAAM-HOTPLUG-3-1": TRUSTED, "CAAM-HOTPLUG-4-1": "0 8 error"}
    assert cli.main(["before-sleep"]) == 0
    assert cli.main(["after-sleep"]) == 0
    assert machine.asked == []


def test_volumes_with_tagged_keys_are_locked_and_unlocked_afterwards(machine: Machine) -> None:
    machine.mappings = {
        "CAAM-HOTPLUG-3-1": TAGGED, "CAAM-HOTPLUG-4-2": TRUSTED, "CAAM-HOTPLUG-5-0": TAGGED,
    }  # fmt: skip
    assert cli.main(["before-sleep"]) == 0
    assert machine.asked == ["Lock 3-1", "Lock 5-0"]
    assert cli.main(["after-sleep"]) == 0
    assert machine.asked[2:] == ["Unlock 3-1", "Unlock 5-0"]
    assert cli.main(["after-sleep"]) == 0
    assert len(machine.asked) == 4


def test_a_volume_in_use_refuses_the_sleep_and_the_others_are_unlocked_at_once(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.mappings = {"CAAM-HOTPLUG-3-1": TAGGED, "CAAM-HOTPLUG-5-1": TAGGED}
    machine.busy = {"5-1"}
    assert cli.main(["before-sleep"]) == 1
    assert machine.asked == ["Lock 3-1", "Lock 5-1", "Unlock 3-1"]
    said = capsys.readouterr().err
    assert "5-1 is in use: pid 7 (writer)" in said
    assert "no sleep now: mapping caam-x-CAAM-HOTPLUG-5-1" in said


def test_a_migration_under_way_refuses_the_sleep(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.mappings = {"CAAM-COMMAND-7": TAGGED}
    assert cli.main(["before-sleep"]) == 1
    assert "CAAM-COMMAND-7" in capsys.readouterr().err
    assert machine.asked == []


def test_without_an_agent_a_live_key_refuses_the_sleep(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.mappings = {"CAAM-HOTPLUG-3-1": TAGGED}
    machine.has_agent = False
    assert cli.main(["before-sleep"]) == 1
    said = capsys.readouterr().err
    assert "the agent does not run" in said
    assert "no sleep now" in said


def test_a_medium_that_was_pulled_in_the_sleep_does_not_keep_the_others_locked(
    machine: Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    machine.mappings = {"CAAM-HOTPLUG-3-1": TAGGED, "CAAM-HOTPLUG-5-1": TAGGED}
    assert cli.main(["before-sleep"]) == 0
    machine.busy = {"3-1"}
    assert cli.main(["after-sleep"]) == 0
    assert machine.asked[2:] == ["Unlock 3-1", "Unlock 5-1"]
    assert "3-1" in capsys.readouterr().err
