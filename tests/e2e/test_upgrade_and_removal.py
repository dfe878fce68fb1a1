"""The Debian package: its content, an upgrade under a mounted medium, and its removal."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from documented import commands
from e2e.support import ANY_BUS, POINT
from vm import cache, debian, installed
from vm.guest import Guest
from vm.installed import NO_RESTART, UNIT, InstalledAgent

RULE: Final = """\
[[rule]]
name = "sticks"
on_stop = "{}"
on_unmount = "unmounting.service"
match.partlabel = "cartridge-*"
"""
EARLIER: Final = "cb910540cfe4ce91f48e8766dc37c43185a037ac"
"""Commit of an earlier state, whose package users may have."""
WRITER: Final = f"""
i=0; while echo $i >>{POINT}/log && sync {POINT}/log; do i=$((i+1)); done >/dev/null 2>/tmp/errors
"""


def earlier() -> bytes:
    """Build the package of that commit from the repository's history, or take it from the cache."""

    def build(folder: Path) -> None:
        tree = folder / "tree"
        tree.mkdir()
        archive = ["git", "-C", debian.REPOSITORY, "archive", EARLIER]
        packed = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
        subprocess.run(["tar", "-x", "-C", tree], input=packed, check=True)
        debian.make(tree, folder)
        shutil.rmtree(tree)

    with cache.locked():
        folder = cache.built(
            "earlier-deb", EARLIER, build, says="Building an earlier Debian package"
        )
    (built,) = folder.glob("*.deb")
    return built.read_bytes()


@asynccontextmanager
async def writer(guest: Guest) -> AsyncIterator[None]:
    """Write to the mounted medium meanwhile; no write may fail."""
    await guest.sh(f"({WRITER}) & echo $! >/tmp/writer")
    yield
    lines = int((await guest.sh(f"wc -l <{POINT}/log")).stdout)
    await guest.until(f"test $(wc -l <{POINT}/log) -gt {lines}")
    assert (await guest.sh("cat /tmp/errors")).stdout == ""
    await guest.sh("kill $(cat /tmp/writer); while pgrep -P $(cat /tmp/writer); do :; done")


async def mount_line(guest: Guest) -> str:
    """Return what the kernel has of the mount, with its number."""
    return (await guest.sh(f"grep ' {POINT} ' /proc/self/mountinfo")).stdout


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


async def test_an_upgrade_hands_mounted_media_over_whatever_on_stop_says(
    guest: Guest, agent: InstalledAgent, medium: Path, tmp_path: Path
) -> None:
    version, package = newer(tmp_path)
    await agent.configure(RULE.format("lock"))
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before, pid = await mount_line(guest), await agent.main_pid()
    async with writer(guest):
        await installed.install(guest, package)
        await agent.until_said("adopting its mount")
        assert await agent.main_pid() not in {0, pid}
        assert await mount_line(guest) == before
    shown = await guest.run("dpkg-query", "-W", "-f", "${Version}", "caam-hotplug")
    assert shown.stdout == version
    assert "unmounting.service" not in await agent.journal()
    assert RULE.format("lock").encode() == await guest.read("/etc/caam-hotplug/agent.toml")
    await agent.stop()
    assert await agent.leftovers() == []
    assert "unmounting.service" in await agent.journal()


async def test_a_restart_hands_over_and_a_stop_does_what_the_rule_says(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(RULE.format("lock"))
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before = await mount_line(guest)
    for command in ("restart", "try-restart"):
        async with writer(guest):
            await guest.run("systemctl", command, UNIT)
            assert await mount_line(guest) == before
    await agent.until_said("adopting its mount", times=2)
    await agent.stop()
    assert await agent.leftovers() == []


async def test_a_stop_does_not_wait_for_a_bus_that_hangs(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure(ANY_BUS)
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    pid = await agent.main_pid()
    await guest.sh(
        f"bus=$(systemctl show -p MainPID --value dbus); kill -STOP $bus; kill {pid}\n"
        f"while kill -0 {pid} 2>/dev/null; do :; done; kill -CONT $bus"
    )
    assert await agent.leftovers() == []


async def test_a_downgrade_and_an_upgrade_from_an_earlier_package_interrupt_no_writer(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    before_this = await asyncio.to_thread(earlier)
    await agent.configure(RULE.format("lock"))
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    before = await mount_line(guest)
    async with writer(guest):
        for package in (before_this, debian.package().read_bytes()):
            await installed.install(guest, package)
            assert await mount_line(guest) == before
    await agent.until_said("adopting its mount", times=2)
    await guest.sh(f"systemctl cat {UNIT} | grep -c KillSignal && exit 1; exit 0")
    asked = await guest.run("caam-hotplug", "eject", "cartridge-01")
    assert asked.stdout == "cartridge-01: safe to remove\n"


async def test_what_an_earlier_package_has_locked_stays_locked(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await installed.install(guest, await asyncio.to_thread(earlier))
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    await guest.run("caam-hotplug", "lock", "cartridge-01")
    await installed.install(guest, debian.package().read_bytes())
    await agent.until_said("locked: before the agent was started")
    assert await agent.leftovers() == []


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
