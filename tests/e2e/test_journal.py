"""The journal as an audit trail: entries are found by the identifier of their event."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from caam_hotplug.systemd.journal import Event
from e2e.support import ANY_BUS, POINT, labelled
from vm.guest import Guest
from vm.installed import InstalledAgent


async def asked(guest: Guest, pid: int, event: Event) -> list[dict[str, str]]:
    """Return the entries of this run of the agent that `journalctl MESSAGE_ID=…` finds."""
    query = ["journalctl", "-o", "json", "--no-pager", f"_PID={pid}", f"MESSAGE_ID={event.value}"]
    await guest.run("journalctl", "--sync")
    lines = (await guest.run(*query)).stdout.splitlines()
    return [{name: text(value) for name, value in json.loads(line).items()} for line in lines]


def text(value: Any) -> str:
    """Return a field's value; journalctl prints a binary one as a list of bytes."""
    return bytes(value).decode() if isinstance(value, list) else str(value)


async def test_unlocking_with_its_blob_and_removal_can_be_queried(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    pid = await agent.main_pid()
    stick = await guest.plug_usb(medium)
    await agent.until_said("cartridge-01.*mounted: at")
    unlocked = (await asked(guest, pid, Event.UNLOCKED))[0]
    (mounted,) = await asked(guest, pid, Event.MOUNTED)
    assert unlocked["BLOB"] == "/data/caam/cartridge-01.bb"
    assert unlocked["RULE"] == "built-in"
    assert mounted["MOUNT_POINT"] == POINT
    assert mounted["LABEL"] == "cartridge-01"
    assert mounted["DEVICE"].startswith("/dev/sd")
    assert mounted["STATE"] == "mounted"
    assert mounted["PRIORITY"] == "6"
    assert mounted["SYSLOG_IDENTIFIER"] == "caam-hotplug"
    assert mounted["_SYSTEMD_UNIT"] == "caam-hotplug.service"
    assert int(mounted["DURATION_MOUNT_US"]) > 0
    assert unlocked["VOLUME"] == mounted["VOLUME"]
    await stick.pull()
    await agent.until_said("cartridge-01.*removed-unsafely")
    (removed,) = await asked(guest, pid, Event.REMOVED_UNSAFELY)
    assert removed["VOLUME"] == mounted["VOLUME"]
    assert removed["PRIORITY"] == "4"


async def test_a_refusal_can_be_queried_and_a_label_stays_in_its_field(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    label = "a\nPRIORITY=0\nMESSAGE_ID=0"
    await agent.configure(ANY_BUS.replace('"cartridge-*"', '"*"'))
    await agent.start()
    pid = await agent.main_pid()
    await guest.plug_scsi(labelled(tmp_path, label))
    await agent.until_said("ignored: any bus: partlabel .*cannot be part")
    found = await asked(guest, pid, Event.IGNORED)
    (refused,) = [entry for entry in found if entry.get("LABEL") == label]
    assert "cannot be part of a file name" in refused["REASON"]
    assert refused["PRIORITY"] == "6"


async def test_start_and_stop_of_the_agent_can_be_queried(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.start()
    pid = await agent.main_pid()
    assert len(await asked(guest, pid, Event.STARTED)) == 1
    await agent.stop()
    (stopped,) = await asked(guest, pid, Event.STOPPED)
    assert stopped["_SYSTEMD_UNIT"] == "caam-hotplug.service"
