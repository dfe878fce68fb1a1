"""Units that accompany a mount, media that are powered off, and users that are ended."""

from __future__ import annotations

from pathlib import Path

from e2e.support import POINT
from vm.guest import Guest
from vm.installed import InstalledAgent

UNITS = "/run/systemd/system"
BEGIN = b"""[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'echo begin "%I" "$$(ls /run/media/%I | head -n 1)" >>/run/unit-lines'
"""
END = b"""[Service]
Type=oneshot
ExecStart=/bin/sh -c 'echo end "%I" "$$(ls /run/media/%I | head -n 1)" >>/run/unit-lines'
ExecStart=/bin/systemctl stop --no-block begin@%i.service
"""
RULE = """
[[rule]]
name = "sticks"
match.bus = "usb"
on_mount = "begin@{partlabel}.service"
on_unmount = "end@{partlabel}.service"
"""


async def unit_lines(guest: Guest, count: int) -> list[str]:
    """Return the lines that the units have written; wait until there are this many."""
    await guest.until(f"test $(wc -l </run/unit-lines) = {count}")
    return (await guest.read("/run/unit-lines")).decode().splitlines()


async def test_units_are_started_when_a_medium_is_mounted_and_before_it_is_unmounted(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.write(f"{UNITS}/begin@.service", BEGIN)
    await guest.write(f"{UNITS}/end@.service", END)
    await guest.sh("systemctl daemon-reload; rm -f /run/unit-lines")
    await agent.configure(RULE)
    await agent.start()
    stick = await guest.plug_usb(medium)
    assert await unit_lines(guest, 1) == ["begin cartridge-01 hello.txt"]
    await guest.run("caam-hotplug", "eject", "--no-power-off", "cartridge-01")
    assert await unit_lines(guest, 2) == [
        "begin cartridge-01 hello.txt",
        "end cartridge-01 hello.txt",
    ]
    await stick.pull()
    await guest.sh(f"rm {UNITS}/begin@.service {UNITS}/end@.service; systemctl daemon-reload")


async def test_an_ejected_stick_is_powered_off_and_served_when_it_is_plugged_again(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    ejected = await guest.run("caam-hotplug", "eject", "cartridge-01")
    assert ejected.stdout == "cartridge-01: safe to remove\n"
    await guest.until("! ls /sys/class/block | grep -q ^sd")
    assert await agent.leftovers() == []
    assert "removed-unsafely" not in await agent.journal()
    await stick.pull()
    await stick.plug()
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"


async def test_an_ejected_scsi_disk_stays_ejected_and_can_be_unlocked_again(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure('[[rule]]\nname = "all"\nmatch.partlabel = "cartridge-*"\n')
    await agent.start()
    await guest.plug_scsi(medium)
    await guest.until_mounted(POINT)
    await guest.run("caam-hotplug", "eject", "cartridge-01")
    await guest.sh("udevadm trigger /dev/sda; udevadm settle")
    assert "ejected" in (await guest.run("caam-hotplug", "status")).stdout
    assert await agent.leftovers() == []
    await guest.run("caam-hotplug", "unlock", "cartridge-01")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"


USER = f"setpriv --reuid=1000 --clear-groups /bin/sh -c 'cd {POINT}; exec sleep 1000'"


async def test_another_users_process_is_named_and_ended_if_the_rule_says_so(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure('[[rule]]\nname = "sticks"\nmatch.bus = "usb"\n')
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(f"chmod 755 {POINT}; ({USER}) >/dev/null 2>&1 & ")
    await guest.until('test -n "$(pgrep -u 1000 -x sleep)"')
    pid = (await guest.sh("pgrep -u 1000 -x sleep")).stdout.strip()
    refused = await guest.run("caam-hotplug", "lock", "cartridge-01", check=False)
    assert refused.returncode == 1
    assert f"pid {pid} (sleep) works in {POINT}" in refused.stderr
    await agent.configure('[[rule]]\nname = "sticks"\nmatch.bus = "usb"\non_busy = "signal"\n')
    await guest.run("systemctl", "reload", "caam-hotplug")
    await agent.until_said("reloaded: 1 rules")
    await guest.run("caam-hotplug", "lock", "cartridge-01")
    assert (await guest.sh("pgrep -u 1000 -x sleep", check=False)).returncode == 1
    assert await agent.leftovers() == []
