"""The Debian package: its content, an upgrade under a mounted medium, and its removal."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

from documented import commands
from e2e.support import POINT, blobs_up_to, labelled
from vm import debian, installed
from vm.guest import Guest
from vm.installed import NO_RESTART, UNIT, InstalledAgent

OTHER_POINT: Final = "/run/media/cartridge-02"
KEEP_AND_LOCK: Final = """\
[[rule]]
name = "kept"
on_stop = "keep"
match.partlabel = "cartridge-01"

[[rule]]
name = "locked"
on_stop = "lock"
match.partlabel = "cartridge-02"
"""


def newer(folder: Path) -> tuple[str, bytes]:
    """Build the next version of the package, with the same files; return it and its version."""
    tree, made = folder / "tree", folder / "newer.deb"
    subprocess.run(["dpkg-deb", "-R", debian.package(), tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub("^(Version: .*)$", r"\1+next", control.read_text(), flags=re.M))
    subprocess.run(
        ["dpkg-deb", "--root-owner-group", "-Znone", "-b", tree, made],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    (version,) = re.findall(r"^Version: (.*)$", control.read_text(), re.M)
    return version, made.read_bytes()


async def test_the_agent_uses_the_distributions_pyudev_and_its_bundled_sdbus(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.start()
    mapped = await guest.read(f"/proc/{await agent.main_pid()}/maps")
    assert b" /usr/lib/caam-hotplug/bundled/sdbus/sd_bus_internals." in mapped
    owner = await guest.run("dpkg-query", "-S", "/usr/lib/python3/dist-packages/pyudev/core.py")
    assert owner.stdout.startswith("python3-pyudev:")
    count = "find /usr/lib/caam-hotplug -name '*.{}' | wc -l"
    compiled = [(await guest.sh(count.format(suffix))).stdout for suffix in ("py", "pyc")]
    assert compiled[0] == compiled[1] != "0\n"
    await guest.sh("getent group caam-hotplug && ! grep caam-hotplug /etc/passwd")
    # The guest has no documentation; all other files have the package's digests.
    verified = (await guest.run("dpkg", "--verify", "caam-hotplug", check=False)).stdout
    assert [line for line in verified.splitlines() if "/usr/share/" not in line] == []


async def test_an_upgrade_locks_or_keeps_mounted_media_as_on_stop_says(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    version, package = newer(tmp_path)
    await blobs_up_to(guest, 2)
    await agent.configure(KEEP_AND_LOCK)
    await agent.start()
    for label, point in (("cartridge-01", POINT), ("cartridge-02", OTHER_POINT)):
        await guest.plug_usb(labelled(tmp_path, label))
        await guest.until_mounted(point)
    await guest.sh(f"sleep infinity < {POINT}/hello.txt & echo $! > /tmp/reader")
    before = await agent.main_pid()
    await installed.install(guest, package)
    shown = await guest.run("dpkg-query", "-W", "-f", "${Version}", "caam-hotplug")
    assert shown.stdout == version
    assert await agent.main_pid() not in {0, before}
    await guest.until_mounted(OTHER_POINT)
    await agent.until_said("'cartridge-01' .*adopting its mount")
    detached = re.findall("'(cartridge-..)' .*: detaching: the agent stops", await agent.journal())
    assert detached == ["cartridge-02"]
    await guest.sh(f"cmp /proc/$(cat /tmp/reader)/fd/0 {POINT}/hello.txt; kill $(cat /tmp/reader)")
    assert KEEP_AND_LOCK.encode() == await guest.read("/etc/caam-hotplug/agent.toml")
    await guest.pull_all()
    await agent.until_said("removed-unsafely", times=2)


async def test_a_removed_agent_releases_its_media_and_a_purged_one_leaves_nothing(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh("dpkg --remove caam-hotplug", timeout_s=120)
    assert await agent.leftovers() == []
    assert "stopped" in await agent.journal()
    await guest.sh(f"! systemctl is-active {UNIT} && ! command -v caam-hotplug")
    await guest.sh("dpkg --purge caam-hotplug", timeout_s=120)
    found = await guest.sh(
        r"find / -xdev \( -path /proc -o -path /sys \) -prune -o -iname '*caam?hotplug*' "
        f"! -path '{Path(NO_RESTART).parent}*' -print"
    )
    assert found.stdout.splitlines() == []
    await guest.sh("! getent group caam-hotplug")
    await guest.sh(f"! systemctl cat {UNIT}")
    await installed.install(guest, debian.package().read_bytes())
    await guest.run("systemctl", "is-enabled", UNIT)
    text = await guest.read("/etc/caam-hotplug/agent.toml")
    assert text == (debian.REPOSITORY / "config/agent.toml").read_bytes()


async def test_an_installation_by_make_runs_without_further_changes(
    guest: Guest, agent: InstalledAgent, medium: Path, tmp_path: Path
) -> None:
    # Remove the package's files except those that it bundles, which make does not install.
    stage, packed = tmp_path / "stage", tmp_path / "stage.tar"
    typed = commands("docs/install.md", "Any other distribution")
    assert typed.pop(0) == "make install"
    subprocess.run(
        ["make", "-s", "-C", debian.REPOSITORY, "install", f"DESTDIR={stage}"], check=True
    )
    subprocess.run(["tar", "-C", stage, "--owner=0", "--group=0", "-cf", packed, "."], check=True)
    await agent.stop()
    await guest.sh(
        "cp -a /usr/lib/caam-hotplug/bundled /tmp && dpkg --purge caam-hotplug", timeout_s=120
    )
    await guest.write("/tmp/stage.tar", packed.read_bytes())
    await guest.sh("tar -C / -xf /tmp/stage.tar && mv /tmp/bundled /usr/lib/caam-hotplug")
    await guest.sh("\n".join(typed))
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.sh("getent group caam-hotplug; systemctl disable --now caam-hotplug")
    await guest.sh("rm -r /usr/lib/caam-hotplug /usr/lib/systemd/system/caam-hotplug*")
    await installed.install(guest, debian.package().read_bytes())
