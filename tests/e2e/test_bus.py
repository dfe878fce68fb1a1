"""The agent on the system bus of the guest, with busctl, gdbus and `caam-hotplug`."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from documented import commands
from e2e.support import ANY_BUS, POINT, labelled
from vm.guest import Completed, Guest
from vm.installed import InstalledAgent

NAME = "org.caamhotplug1"
MANAGER = "/org/caamhotplug1"
VOLUME = f"{NAME}.Volume"
MEMBER = "setpriv --reuid=nobody --regid=nogroup --groups caam-hotplug"
OTHER_USER = "setpriv --reuid=nobody --regid=nogroup --clear-groups"
LOOKED_AT = re.compile(r"\n  as of [0-9 :-]{19}, when the kernel was last looked at(?=\n)")
"""Another moment in each answer, perhaps."""


async def cli(guest: Guest, *arguments: str, who: str = "", check: bool = True) -> Completed:
    """Run `caam-hotplug`."""
    return await guest.sh(f"{who} caam-hotplug {shlex.join(arguments)}", check=check, timeout_s=300)


async def busctl(guest: Guest, *arguments: str, who: str = "", check: bool = True) -> Completed:
    """Run `busctl`."""
    return await guest.sh(
        f"{who} busctl --timeout=240 {shlex.join(arguments)}", check=check, timeout_s=300
    )


async def path_of(guest: Guest, label: str = "cartridge-01") -> str:
    """Return the path of the volume with this label."""
    result = await busctl(
        guest, "--json=short", "call", NAME, MANAGER,
        "org.freedesktop.DBus.ObjectManager", "GetManagedObjects",
    )  # fmt: skip
    objects = json.loads(result.stdout)["data"][0]
    [path] = [
        path
        for path, interfaces in objects.items()
        if interfaces.get(VOLUME, {}).get("Label", {}).get("data") == label
    ]
    return str(path)


async def shown(guest: Guest, path: str) -> dict[str, Any]:
    """Return the properties of the volume's object."""
    result = await busctl(
        guest, "--json=short", "call", NAME, path,
        "org.freedesktop.DBus.Properties", "GetAll", "s", VOLUME,
    )  # fmt: skip
    return {name: value["data"] for name, value in json.loads(result.stdout)["data"][0].items()}


async def until_state(guest: Guest, state: str, label: str = "cartridge-01") -> None:
    """Wait until the volume is shown in this state, by busctl, which starts faster than our CLI."""
    objects = f"{MANAGER}/volumes/"
    await guest.until(
        f"busctl --json=short call {NAME} {MANAGER} org.freedesktop.DBus.ObjectManager "
        f"GetManagedObjects | grep -oP '\"{objects}((?!\"{objects}).)*' | "
        f"grep -F '\"Label\":{text(label)}' | grep -qF '\"State\":{text(state)}'"
    )


def text(value: str) -> str:
    """A property's value as busctl writes it."""
    return f'{{"type":"s","data":"{value}"}}'


async def test_a_volume_is_on_the_bus_from_the_plug_to_the_pull(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.sh(f"stdbuf -oL gdbus monitor --system -d {NAME} >/tmp/heard 2>&1 &")
    await guest.until("grep -q 'is owned by' /tmp/heard")
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await until_state(guest, "mounted")
    path = await path_of(guest)
    assert re.fullmatch(r"/org/caamhotplug1/volumes/[0-9]+_1", path)
    result = await shown(guest, path)
    assert result["Device"] == "/dev/sda1"
    assert result["MountPoint"] == POINT
    assert result["Filesystem"] == "ext4"
    assert result["ReadOnly"] is False
    assert path.endswith(f"/{result['DiskSeq']}_{result['Partition']}")
    size = (await guest.run("blockdev", "--getsize64", "/dev/sda1")).stdout
    assert result["Size"] == int(size)
    source = (await guest.run("findmnt", "-no", "SOURCE", POINT)).stdout.strip()
    node = (await guest.run("readlink", "-f", source)).stdout.strip()
    assert result["MappingDevice"] == node
    now = int((await guest.run("date", "+%s")).stdout)
    assert 0 <= now - result["Since"] / 1e6 < 600
    assert result["StepDurations"]
    assert all(took >= 0 for took in result["StepDurations"].values())
    await stick.pull()
    await agent.until_said("cartridge-01.*removed-unsafely")
    heard = await guest.read("/tmp/heard")
    states = re.findall(rb"'State': <'([a-z-]+)'>", heard)
    order = [b"unlocking", b"mounting", b"mounted", b"detaching", b"removed-unsafely"]
    assert [state for state in states if state in order] == order
    assert heard.count(f"InterfacesAdded (objectpath '{path}'".encode()) == 1
    await guest.sh("pkill gdbus")


async def test_an_ejected_medium_stays_released_until_it_is_unlocked_by_request(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    result = await cli(guest, "eject", "--no-power-off", "cartridge-01")
    assert result.stdout == "cartridge-01: safe to remove\n"
    assert await agent.leftovers() == []
    await until_state(guest, "ejected")
    await agent.start()  # a new run knows of the eject only from the disk's node
    await until_state(guest, "ejected")
    await guest.sh("udevadm trigger --settle --action=change /dev/sda")
    await until_state(guest, "locked")  # udev reports this also once others have written to it
    await agent.start()
    await until_state(guest, "locked")
    assert await agent.leftovers() == []
    assert "eject" in await agent.until_said("asked for by .*uid 0 .root., pid [0-9]+, :1")
    result = await cli(guest, "unlock", "/dev/sda1")
    assert result.stdout == f"cartridge-01: mounted: {POINT} (ext4)\n"
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"


async def test_eject_over_the_bus_says_that_it_is_safe_to_remove(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    result = await busctl(guest, "call", NAME, await path_of(guest), VOLUME, "Eject", "a{sv}", "0")
    assert "safe to remove" in result.stdout
    assert await agent.leftovers() == []
    await stick.pull()


async def test_a_busy_volume_is_not_ejected_and_its_holder_is_named(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh(f"sleep 1000 < {POINT}/hello.txt >/dev/null 2>&1 & echo $! >/tmp/holder")
    pid = (await guest.sh("cat /tmp/holder")).stdout.strip()
    assert POINT in (await cli(guest, "status")).stdout
    result = await cli(guest, "eject", "cartridge-01", check=False)
    assert result.returncode == 1
    first, *holders = result.stderr.splitlines()
    assert first == f"caam-hotplug: eject cartridge-01: {POINT} is in use:"
    assert [line for line in holders if f"pid {pid} (sleep)" in line and "hello.txt" in line]
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await until_state(guest, "mounted")
    result = await busctl(
        guest, "call", NAME, await path_of(guest), VOLUME, "Eject", "a{sv}", "0", check=False
    )
    assert f"pid {pid}" in result.stderr
    await guest.sh(f"kill {pid}")
    assert (await cli(guest, "eject", "--no-power-off", POINT)).returncode == 0


async def test_lock_unlock_and_retry_by_every_name_of_a_volume(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh("mv /data/caam/cartridge-01.bb /root/later.bb")
    await agent.start()
    await guest.plug_usb(medium)
    await until_state(guest, "waiting")
    refused = await cli(guest, "retry", "cartridge-01", check=False)
    assert refused.returncode == 1
    assert "cartridge-01.bb" in refused.stderr
    await guest.sh(
        "cp /root/later.bb /data/caam/.new && mv /data/caam/.new /data/caam/cartridge-01.bb"
    )
    await cli(guest, "retry", "/dev/disk/by-partlabel/cartridge-01")
    await guest.until_mounted(POINT)
    await until_state(guest, "mounted")
    refused = await cli(guest, "unlock", "cartridge-01", check=False)
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert (await cli(guest, "lock", POINT)).stdout.startswith("cartridge-01: locked")
    assert await agent.leftovers() == []
    assert (await cli(guest, "unlock", "/dev/sda1")).stdout.startswith("cartridge-01: mounted")
    status = json.loads((await cli(guest, "status", "--json")).stdout)
    assert status["counters"]["mounted"] == 2


async def test_reload_applies_the_rules_or_changes_nothing(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure('[[rule]]\nname = "none"\naction = "ignore"\n')
    await agent.start()
    await guest.plug_usb(medium)
    await until_state(guest, "ignored")
    await agent.configure('[[rule]]\nname = "typo"\nmatch.partlable = "x"\n')
    refused = await cli(guest, "reload", check=False)
    assert refused.returncode == 1
    assert "did you mean 'partlabel'?" in refused.stderr
    result = await busctl(guest, "call", NAME, MANAGER, f"{NAME}.Manager", "Reload", check=False)
    assert "partlable" in result.stderr
    await until_state(guest, "ignored")
    await agent.configure(ANY_BUS)
    assert (await cli(guest, "reload")).stdout.endswith("the configuration is in force\n")
    await guest.until_mounted(POINT)


async def test_explain_over_the_bus_is_what_the_command_says(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.run("udevadm", "settle")  # or it may tell more between the two
    result = await busctl(
        guest, "--json=short", "call", NAME, MANAGER, f"{NAME}.Manager", "Explain", "s",
        "/dev/sda1",
    )  # fmt: skip
    with_command = await cli(guest, "explain", "/dev/sda1")
    text = json.loads(result.stdout)["data"][0]
    assert LOOKED_AT.sub("", text).strip() == LOOKED_AT.sub("", with_command.stdout).strip()
    result = await busctl(
        guest, "call", NAME, MANAGER, f"{NAME}.Manager", "Explain", "s", "/dev/null", check=False
    )
    assert "it is no block device" in result.stderr


async def test_every_command_of_the_page_on_the_bus_works(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await until_state(guest, "mounted")
    path = await path_of(guest)
    for command in commands("docs/dbus.md"):
        typed = command.replace(f"{MANAGER}/volumes/9_1", path).replace("/dev/sdb1", "/dev/sda1")
        typed = typed.replace("timeout 60 ", "timeout 5 ")
        done = await guest.sh(typed, check=False)
        stopped = 124 if typed.startswith("timeout ") else 0
        assert done.returncode == stopped, f"{typed}: {done}"
        assert done.stdout or done.stderr.startswith("Monitoring"), typed
    await until_state(guest, "ejected")


async def test_everyone_may_read_and_only_root_and_operators_may_make_requests(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await until_state(guest, "mounted")
    result = await cli(guest, "status", who=OTHER_USER)
    assert POINT in result.stdout
    path = await path_of(guest)
    assert (await busctl(guest, "introspect", NAME, path, who=OTHER_USER)).returncode == 0
    for command in (["lock", "cartridge-01"], ["eject", "cartridge-01"], ["reload"]):
        refused = await cli(guest, *command, who=OTHER_USER, check=False)
        assert refused.returncode == 1
        assert "only root and members of group caam-hotplug" in refused.stderr
    await until_state(guest, "mounted")
    assert (await cli(guest, "lock", "cartridge-01", who=MEMBER)).returncode == 0
    await agent.until_said("asked for by .*nobody")


async def test_a_lax_policy_does_not_open_the_agent(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    lax = "/etc/dbus-1/system.d/lax.conf"
    policy = f'<allow send_destination="{NAME}"/>'
    await guest.write(
        lax, f'<busconfig><policy context="mandatory">{policy}</policy></busconfig>'.encode()
    )
    await guest.sh("systemctl reload dbus")
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await until_state(guest, "mounted")
    path = await path_of(guest)
    for method in (["Lock"], ["Unlock"], ["Retry"], ["Eject", "a{sv}", "0"]):
        result = await busctl(
            guest, "call", NAME, path, VOLUME, *method, who=OTHER_USER, check=False
        )
        assert "Access denied" in result.stderr
    assert "refused to uid" in await agent.until_said("refused to uid .*nobody", times=4)
    await until_state(guest, "mounted")
    await guest.sh(f"rm {lax}; systemctl reload dbus")


async def test_watch_follows_over_a_crash_and_a_restart_that_adopts(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.sh("caam-hotplug watch >/tmp/watched 2>&1 &")
    await guest.plug_usb(medium)
    await guest.until(f"grep -q 'cartridge-01 (/dev/sda1): mounted: {POINT}' /tmp/watched")
    await agent.kill()
    await guest.until("grep -q 'the agent has stopped; waiting for it' /tmp/watched")
    assert (await cli(guest, "status", check=False)).returncode == 3
    await agent.start()
    await guest.until("grep -q 'the agent runs' /tmp/watched")
    await guest.until("test $(grep -c ': mounted: ' /tmp/watched) = 2")
    result = await shown(guest, await path_of(guest))
    assert result["State"] == "mounted"
    assert result["MountPoint"] == POINT
    await guest.sh("pkill -INT -f 'caam-hotplug watch'")


@pytest.mark.parametrize("back", [True, False])
async def test_without_a_bus_media_are_served_and_one_message_is_logged(
    guest: Guest, agent: InstalledAgent, medium: Path, back: bool
) -> None:
    await agent.stop()
    if not back:
        await guest.sh("systemctl stop dbus.socket dbus.service")
        await agent.start()
        await agent.until_said("no system bus, media are served without it")
    else:
        await agent.start()
        await agent.until_said("on the system bus as org.caamhotplug1")
        await guest.sh("systemctl stop dbus.socket dbus.service")
        await agent.until_said("the system bus has gone")
    stick = await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    result = await cli(guest, "status", check=False)
    assert result.returncode == 3
    await guest.sh("systemctl start dbus.socket")
    await agent.until_said("on the system bus as org.caamhotplug1", times=1 + back)
    await until_state(guest, "mounted")
    assert (await agent.journal()).count("no system bus") <= 1
    await stick.pull()
    await agent.until_said("cartridge-01.*removed-unsafely")


async def test_a_hostile_label_is_escaped(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    label = "\x1b[2J\u202e\U0001f4a5"
    await guest.plug_usb(labelled(tmp_path, label))
    await guest.until("caam-hotplug status --all | grep -q u202e")
    result = await cli(guest, "status", "--all")
    assert "\x1b" not in result.stdout
    listed = json.loads((await cli(guest, "status", "--json")).stdout)["volumes"]
    assert ascii(label) in [volume["label"] for volume in listed]
    gdbus = await guest.sh(
        f"gdbus call --system -d {NAME} -o {MANAGER} "
        "-m org.freedesktop.DBus.ObjectManager.GetManagedObjects"
    )
    assert "u202e" in gdbus.stdout


async def test_a_medium_that_udev_has_not_reported_is_explained_by_the_rule_that_holds_it(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.sh("kill -STOP $(pidof systemd-udevd)")
    try:
        await guest.plug_usb(medium)
        await guest.until_mounted(POINT)
        result = await busctl(
            guest, "--json=short", "call", NAME, MANAGER, f"{NAME}.Manager", "Explain", "s",
            "/dev/sda1",
        )  # fmt: skip
        with_command = await cli(guest, "explain", "/dev/sda1")
        status = await cli(guest, "status")
    finally:
        await guest.sh("kill -CONT $(pidof systemd-udevd)")
    text, times = LOOKED_AT.subn("", json.loads(result.stdout)["data"][0])
    assert times == 1
    assert LOOKED_AT.sub("", with_command.stdout) == f"{text}\n"
    assert "  udev has not reported it yet, and may report more" in text
    assert f"it is mounted: at {POINT}, read-write\n  rule 'built-in' is in force for it\n" in text
    assert "rule 'built-in' matches it" in text
    assert "no rule" not in text
    assert "  mounted  " in status.stdout
