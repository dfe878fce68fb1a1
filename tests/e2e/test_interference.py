"""What users do by hand to a medium of the installed service, and what it answers."""

from __future__ import annotations

from pathlib import Path

from e2e.support import ANY_BUS, POINT
from vm.guest import Guest
from vm.installed import InstalledAgent

STATE = "caam-hotplug status | grep -q 'cartridge-01.*{}'"
LIVE = "dmsetup ls | sed -n 's/^\\(caam-cartridge-01[^\\t]*\\)\\t.*/\\1/p'"


async def until_state(guest: Guest, words: str) -> None:
    await guest.until(STATE.format(words))


async def test_a_medium_is_unmounted_detached_remounted_suspended_and_hidden_by_hand(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(ANY_BUS)
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)

    await guest.run("umount", POINT)
    await until_state(guest, "locked")
    await guest.until('test -z "$(dmsetup ls | grep caam-)"')
    await guest.run("caam-hotplug", "unlock", "cartridge-01")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"

    await guest.sh(f"cd {POINT}; sleep 1000 </dev/null >/dev/null 2>&1 &")
    await guest.run("umount", "-l", POINT)
    await guest.until("caam-hotplug status | grep -q 'held open: pid .*sleep.*works in /'")
    await guest.sh("pkill -x sleep")
    await until_state(guest, "locked")
    await guest.run("caam-hotplug", "unlock", "cartridge-01")

    await guest.run("mount", "-o", "remount,ro", POINT)
    await until_state(guest, "mounted .*(ext4, read-only)")
    await guest.run("mount", "-o", "remount,rw", POINT)
    await until_state(guest, "mounted .*(ext4)")

    name = (await guest.sh(LIVE)).stdout.strip()
    await guest.run("dmsetup", "suspend", "--nolockfs", "--noflush", name)
    await guest.until("caam-hotplug status | grep -q 'mapping caam-.* is suspended'")
    for request in ("lock", "eject"):
        refused = await guest.run("caam-hotplug", request, "cartridge-01", check=False)
        assert f"dmsetup resume {name}` ends that" in refused.stderr
    await guest.run("dmsetup", "resume", name)

    await guest.sh("mount --bind /run/media /run/media")
    await guest.run("mount", "-t", "tmpfs", f"/dev/mapper/{name}", "/mnt")
    await guest.run("caam-hotplug", "eject", "--no-power-off", "cartridge-01")
    await guest.sh('umount /run/media /mnt; test -z "$(ls /run/media)"')
    assert "removed-unsafely" not in await agent.journal()
    await stick.pull()


async def test_a_filesystem_is_checked_without_a_mount_and_says_its_errors(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(ANY_BUS)
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh("echo by a test >/sys/fs/ext4/dm-*/trigger_fs_error")
    await guest.run("caam-hotplug", "status")  # a read has it looked at
    await agent.until_said("mounted: at .*, read-only; .*counted errors")
    refused = await guest.run("caam-hotplug", "eject", "cartridge-01", check=False)
    assert "not safe to remove" in refused.stderr
    await guest.run("caam-hotplug", "lock", "cartridge-01")

    said = await guest.run("caam-hotplug", "unlock", "--no-mount", "cartridge-01")
    assert "not mounted, since that was asked for" in said.stdout
    await guest.sh("fsck.ext4 -fy /dev/mapper/caam-cartridge-01*; test $? -le 1")
    await guest.run("systemctl", "restart", "caam-hotplug")
    await until_state(guest, "unlocked")
    await guest.sh("mount /dev/mapper/caam-cartridge-01* /mnt")
    await guest.until('caam-hotplug status --json | grep -q \'"mount_point": "/mnt"\'')
    refused = await guest.run("caam-hotplug", "lock", "cartridge-01", check=False)
    assert "it is mounted at /mnt" in refused.stderr
    await guest.run("umount", "/mnt")
    await guest.run("caam-hotplug", "lock", "cartridge-01")
    await guest.run("caam-hotplug", "unlock", "cartridge-01")
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await stick.pull()
