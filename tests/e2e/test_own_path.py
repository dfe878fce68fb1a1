"""A partition of the board at its own path, by the installed package as its unit confines it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from e2e.support import ANY_BUS, POINT
from vm.guest import Guest
from vm.installed import InstalledAgent

PATH: Final = "/srv/recorder"
RULE: Final = f"""
[[rule]]
name = "recorder"
match = {{ removable = false, partlabel = "cartridge-01" }}
mount.path = "{PATH}"
mount.options = ["nodev", "noexec"]
"""


async def test_a_partition_has_its_path_in_the_tree_on_the_bus_and_in_the_status(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(RULE)
    await agent.start()
    plug = await guest.plug_scsi(medium)
    await guest.until_mounted(PATH)
    assert await guest.read(f"{PATH}/hello.txt") == b"Encrypted data\n"
    options = (await guest.sh(f"grep ' {PATH} ' /proc/self/mountinfo")).stdout.split()[5]
    assert {"nosuid", "nodev", "noexec"} & set(options.split(",")) == {"nodev", "noexec"}
    shown = json.loads((await guest.run("caam-hotplug", "status", "--json")).stdout)
    (volume,) = [each for each in shown["volumes"] if each["state"] == "mounted"]
    assert volume["mount_point"] == PATH
    await guest.sh(
        "for object in $(busctl --list tree org.caamhotplug1 | grep volumes/); do\n"
        "  busctl get-property org.caamhotplug1 $object org.caamhotplug1.Volume MountPoint\n"
        f"done | grep -qx 's \"{PATH}\"'"
    )
    await guest.until("systemctl is-active srv-recorder.mount")
    explained = await guest.run("caam-hotplug", "explain", volume["device"])
    assert f"  mount point {PATH} (nodev,noexec)" in explained.stdout
    await guest.run("caam-hotplug", "eject", PATH)
    assert (await guest.sh(f"stat {PATH}", check=False)).returncode != 0
    await plug.pull()


async def test_it_is_adopted_after_a_crash_and_moved_by_other_rules(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh(f"install -d -m 0750 -o 1000 -g 1000 {PATH}")
    await agent.configure(RULE)
    await agent.start()
    await guest.plug_scsi(medium)
    await agent.until_said("conflict: .*belongs to user 1000 with mode 0750, and cannot be opened")
    await guest.sh(f"chmod o+rx {PATH}")
    await guest.until_mounted(PATH)
    before = (await guest.sh(f"grep ' {PATH} ' /proc/self/mountinfo")).stdout
    await agent.kill()
    await agent.start()
    await agent.until_said("adopting its mount /srv/recorder")
    assert (await guest.sh(f"grep ' {PATH} ' /proc/self/mountinfo")).stdout == before
    await agent.kill()
    await agent.configure(ANY_BUS)
    await agent.start()
    await guest.until_mounted(POINT)
    await guest.sh(f"! grep ' {PATH} ' /proc/self/mountinfo; rmdir {PATH}")
