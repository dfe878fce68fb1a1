"""The pages' commands, as they stand there, run in a guest."""

from __future__ import annotations

from pathlib import Path

from documented import commands
from e2e.support import POINT, labelled
from vm import debian, media
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A, OTPMK_B


def script(typed: list[str]) -> str:
    """What was typed, for the guest's first disk."""
    lines = "\n".join(typed)
    for name in ("sdX", "sdb"):
        lines = lines.replace(f"/dev/{name}", "/dev/sda")
    return lines


QUICK_START = "docs/quick-start.md"


async def test_the_quick_start_ends_in_a_mounted_medium(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.stop()
    await guest.sh("rm -rf /data/caam; dpkg --purge caam-hotplug", timeout_s=120)
    blank = tmp_path / "blank.img"
    media.write_disk(blank, "as-bought", bytes(16 << 20))
    await guest.plug_usb(blank)
    await guest.until("test -b /dev/sda1")
    await guest.sh(script(commands(QUICK_START, "1. The kernel")))
    made = [*commands(QUICK_START, "3. A key"), *commands(QUICK_START, "4. A medium")]
    await guest.sh(script(made))
    assert (await guest.sh("ls /data/caam")).stdout == "cartridge-01.bb\n"
    typed = commands(QUICK_START, "5. The agent")
    assert typed.pop(0) == "make deb"
    package = debian.package()
    named = typed[0].replace("arm64", "amd64")
    assert named == f"apt install ./build/{package.name}"
    await guest.write(f"/root/build/{package.name}", package.read_bytes())
    await guest.sh(
        "cd /root\n" + script(["export DEBIAN_FRONTEND=noninteractive", named]), timeout_s=300
    )
    await guest.sh(script(typed[1:]))
    await guest.until_mounted(POINT)
    shown = await guest.sh(script(commands(QUICK_START, "6. Plug it in")))
    assert "1 mounted" in shown.stdout
    assert "lost+found" in shown.stdout
    await guest.sh("rm -r /root/build")


async def looked_at(guest: Guest, page: str) -> str:
    """What the page's commands print; each succeeds, or finds nothing, without complaint."""
    shown = ""
    for command in commands(page):
        done = await guest.sh(script([command]), check=False)
        found_nothing = command.startswith(("grep", "journalctl")) and done.returncode == 1
        assert done.returncode == 0 or found_nothing, f"{command}: {done}"
        assert done.stderr == "", command
        shown += done.stdout
    return shown


async def test_what_the_page_on_debugging_looks_at_can_be_looked_at(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.configure("")
    await agent.start()
    await guest.plug_usb(medium)
    await guest.until_mounted(POINT)
    shown = await looked_at(guest, "docs/debugging.md")
    assert "agent.toml: valid" in shown
    assert "rule 'built-in' matches it" in shown
    assert "ID_PART_ENTRY_NAME=cartridge-01" in shown
    assert "capi:tk(cbc(aes))-plain" in shown


async def test_the_journals_questions_have_answers(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await agent.start()
    await guest.plug_usb(medium)
    await agent.until_said("cartridge-01.*mounted: at")
    await guest.run("journalctl", "--sync")
    shown = await looked_at(guest, "docs/journal.md")
    assert "/data/caam/cartridge-01.bb" in shown


async def test_a_second_board_opens_a_medium_that_was_enrolled_there(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.stop()
    await guest.cold_boot_caam(OTPMK_B)
    await guest.sh("rm /data/caam/cartridge-01.bb")
    await agent.start()
    await guest.plug_usb(labelled(tmp_path, "cartridge-01"))
    await agent.until_said("cartridge-01.*waiting: no blob")
    await guest.sh(script(commands("docs/move-between-boards.md")))
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
    await agent.stop()
    await guest.cold_boot_caam(OTPMK_A)


async def test_a_medium_is_read_without_any_caam(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.stop()
    await guest.sh("rmmod caam_sim")
    await guest.plug_usb(labelled(tmp_path, "cartridge-01"))
    await guest.until("test -b /dev/sda1")
    shown = await guest.sh("cd /root\n" + script(commands("docs/recover-on-a-pc.md")))
    assert "16\n" in shown.stdout
    assert "hello.txt\n" in shown.stdout
    await guest.sh(f"test ! -e /root/recovery.key; modprobe caam_sim otpmk={OTPMK_A} secure=1")
