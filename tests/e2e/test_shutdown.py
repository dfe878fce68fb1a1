"""The machine goes down with a medium mounted."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.support import POINT, labelled
from vm import installed, machine
from vm.guest import GuestDiedError
from vm.installed import InstalledAgent

END = b"""[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo "hook: %I $$(ls /run/media/%I | head -n 1)" >/dev/ttyS0'
ExecStart=/bin/sh -c 'echo "written" >/run/media/%I/goodbye; cat /run/media/%I/goodbye >/dev/ttyS0'
"""
RULE = '[[rule]]\nname = "sticks"\nmatch.bus = "usb"\non_unmount = "end@{partlabel}.service"\n'


@pytest.mark.parametrize(
    ("command", "on_stop"),
    [("reboot", "lock"), ("start poweroff.target", "keep")],
)
async def test_the_unit_before_an_unmount_runs_with_the_medium_mounted(
    tmp_path: Path, command: str, on_stop: str
) -> None:
    async with machine.restored(installed.layer()) as guest:
        await guest.write("/run/systemd/system/end@.service", END)
        await guest.run("systemctl", "daemon-reload")
        agent = InstalledAgent(guest)
        await agent.configure(f'{RULE}on_stop = "{on_stop}"\n')
        await agent.start()
        await guest.plug_usb(labelled(tmp_path, "cartridge-01", total_mib=64))
        await guest.until_mounted(POINT)
        await guest.run("systemctl", "--no-block", *command.split())
        with pytest.raises(GuestDiedError):
            await guest.until("false")
        console = guest.console()
        assert "hook: cartridge-01 hello.txt" in console
        assert "written" in console
