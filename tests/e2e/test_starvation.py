"""Nobody can keep the agent from releasing a pulled medium, or from stopping."""

from __future__ import annotations

from pathlib import Path

from e2e.support import POINT
from vm.guest import Guest
from vm.installed import UNIT, InstalledAgent

FLOOD = Path(__file__).parents[1] / "bus" / "flood.py"
FLOODS = (
    "objects large --unread",
    "get all",
    "introspect objects ping",
    "get unknown --unanswered",
)
WATCHDOG = f"/etc/systemd/system/{UNIT}.d/watchdog.conf"
PINGED = f"systemctl show -p WatchdogTimestampMonotonic --value {UNIT}"
CONFIGURATION = "/etc/caam-hotplug"
GROWTH_KIB = 4 << 10
"""Less than one of the flood's large messages."""


async def most_memory(guest: Guest, pid: int) -> int:
    """Return the largest amount of memory in KiB that the process has ever had."""
    return int((await guest.sh(f"awk '/^VmHWM:/ {{ print $2 }}' /proc/{pid}/status")).stdout)


async def until_pinged(guest: Guest) -> None:
    """Wait until the agent has pinged its watchdog once more."""
    await guest.sh(f"before=$({PINGED}); until test $({PINGED}) != $before; do sleep 0.5; done")


async def test_a_medium_is_released_while_other_users_flood_the_agent(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.write(WATCHDOG, b"[Service]\nWatchdogSec=10\n")
    await guest.write("/run/flood.py", FLOOD.read_bytes())
    await guest.run("systemctl", "daemon-reload")
    await agent.start()
    pid = await agent.main_pid()
    for _ in range(2):  # with what it has once for all
        stick = await guest.plug_usb(medium)
        await guest.until_mounted(POINT)
        await stick.pull()
        await guest.until_unmounted(POINT)
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before = await most_memory(guest, pid)
    for kinds in FLOODS:
        await guest.sh(
            "setpriv --reuid=nobody --regid=nogroup --clear-groups "
            f"python3 /run/flood.py {kinds} >/dev/null 2>>/tmp/floods & echo $! >>/run/floods"
        )
        if "large" in kinds:
            await agent.until_said("a message of .* bytes on the bus is dropped")
    alive = "kill -0 $(cat /run/floods)"
    await until_pinged(guest)
    await guest.sh(alive)
    await stick.pull()
    await agent.until_said("cartridge-01.*removed-unsafely")
    assert await agent.leftovers() == []
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(alive)
    await until_pinged(guest)
    assert await agent.main_pid() == pid
    assert await most_memory(guest, pid) - before < GROWTH_KIB
    await guest.sh(f"kill $(cat /run/floods); rm /run/floods /run/flood.py {WATCHDOG}")
    assert (await guest.run("caam-hotplug", "status")).stdout.count("mounted") == 1
    await guest.run("systemctl", "daemon-reload")


async def test_a_stop_does_not_wait_for_a_reload_from_a_filesystem_that_hangs(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh(
        "truncate -s 16M /var/tmp/etc.img; mkfs.ext4 -q /var/tmp/etc.img\n"
        "loop=$(losetup -f --show /var/tmp/etc.img)\n"
        'dmsetup create etc --table "0 32768 linear $loop 0"\n'
        f"mkdir -p {CONFIGURATION}; mount /dev/mapper/etc {CONFIGURATION}"
    )
    await agent.configure('[[rule]]\nname = "any bus"\nmatch.partlabel = "cartridge-*"\n')
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    pid = await agent.main_pid()
    await guest.sh(
        "sync; echo 1 >/proc/sys/vm/drop_caches; dmsetup suspend --nolockfs --noflush etc\n"
        f"systemctl reload {UNIT}\n"
        f"until grep -l folio_wait /proc/{pid}/task/*/wchan; do sleep 0.1; done"
    )
    stopped = await guest.run("timeout", "120", "systemctl", "stop", UNIT, check=False)
    await guest.sh(
        f"dmsetup resume etc; umount {CONFIGURATION}; dmsetup remove etc; losetup -D\n"
        "rm /var/tmp/etc.img"
    )
    assert stopped.returncode == 0
    result = await guest.run("systemctl", "show", "-p", "Result", "--value", UNIT)
    assert result.stdout.strip() == "success"
    assert await agent.leftovers() == []
