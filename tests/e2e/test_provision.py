"""Media that the command makes: the agent mounts them, a PC and a second board open them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

import pytest

from documented import commands
from vm import installed, machine, media
from vm.guest import Guest
from vm.installed import InstalledAgent
from vm.media import OTPMK_A, OTPMK_B

LABEL = "archive-01"
POINT = f"/run/media/{LABEL}"
RECOVERY = f"/root/{LABEL}.recovery"


def blank(folder: Path, name: str = "blank.img", mib: int = 64) -> Path:
    """A medium that was never written to."""
    with (folder / name).open("wb") as file:
        file.truncate(mib << 20)
    return folder / name


def documented(words: str) -> str:
    """The command of docs/provision.md that has these words. Raises: ValueError if not one has."""
    is_dry = "--dry-run" in words
    (command,) = [
        each
        for each in commands("docs/provision.md")
        if words in each and ("--dry-run" in each) is is_dry
    ]
    return command


async def keep_a_file(guest: Guest, text: str) -> None:
    await guest.sh(f"echo '{text}' > {POINT}/kept; sync -f {POINT}/kept")


async def test_a_medium_made_beside_the_agent_is_mounted_and_opens_on_a_pc_and_a_second_board(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    await guest.plug_usb(blank(tmp_path, "neighbour.img"))
    await guest.until("test -b /dev/sda")
    await guest.plug_usb(blank(tmp_path))
    await guest.until("test -b /dev/sdb")
    done = await guest.sh(documented("provision /dev/sdb --label archive-01"))
    assert done.stdout.startswith(f"/dev/sdb1: {LABEL} is made")
    assert done.stderr == ""
    assert (await guest.run("stat", "-c", "%a", RECOVERY)).stdout == "600\n"
    await guest.until_mounted(POINT)
    await keep_a_file(guest, "of the first board")
    again = await guest.run("caam-hotplug", "provision", "/dev/sdb", "--label", "x", check=False)
    assert f"it is in use: mapping caam-{LABEL}-" in again.stderr
    assert LABEL in (await guest.sh(documented("key list"))).stdout
    assert "key_bytes   16" in (await guest.sh(documented("key inspect"))).stdout
    assert "32 bytes" in (await guest.sh(documented("key create"))).stdout
    await agent.stop()

    command = documented("cryptsetup open")
    assert command in await text_of(guest, RECOVERY)
    await guest.sh(f"rmmod caam_sim; cd /root; {command}; {documented('mount /dev/mapper')}")
    assert await guest.read("/mnt/kept") == b"of the first board\n"
    await guest.sh(f"{documented('umount /mnt')}; {documented('cryptsetup close')}")

    await guest.sh(f"modprobe caam_sim otpmk={OTPMK_B}; rm /data/caam/{LABEL}.bb")
    done = await guest.sh(documented("key enroll"))
    assert done.stdout == f"/data/caam/{LABEL}.bb: made; this board opens {LABEL} too\n"
    await agent.start()
    await guest.until_mounted(POINT)
    assert await guest.read(f"{POINT}/kept") == b"of the first board\n"
    await agent.stop()
    await guest.sh(f"rm {RECOVERY}")
    await guest.cold_boot_caam(OTPMK_A)


async def text_of(guest: Guest, file: str) -> str:
    return (await guest.read(file)).decode()


async def test_a_medium_that_holds_something_is_erased_for_the_running_agent(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    # The blob of the saved guest would be in the way of a new medium of that label.
    await guest.sh("rm /data/caam/cartridge-01.bb")
    await agent.start()
    await guest.plug_usb(blank(tmp_path, "neighbour.img"))
    await guest.until("test -b /dev/sda")
    await guest.plug_usb(media.make_medium(tmp_path / "used.img", "other"))
    await guest.until("test -b /dev/sdb1")
    refused = await guest.sh(
        documented("cartridge-01 --erase sdb").partition("--erase")[0], check=False
    )
    assert refused.returncode == 1
    assert "it holds a partition table (gpt)" in refused.stderr
    planned = await guest.sh(documented("--erase sdb --dry-run"))
    assert "- erase /dev/sdb, which holds a partition table (gpt)" in planned.stdout
    assert planned.stdout.endswith("nothing was changed\n")
    await guest.run("test", "!", "-e", "/data/caam/cartridge-01.bb")
    await guest.sh(documented("cartridge-01 --erase sdb"))
    await guest.until_mounted("/run/media/cartridge-01")


TWO: Final = "label: gpt\\nstart=2048, size=32768, name=system\\nname=recorder\\n"


async def test_a_partition_is_made_while_another_of_its_disk_is_mounted_and_the_agent_mounts_it(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    await guest.plug_usb(blank(tmp_path, "neighbour.img"))
    await guest.until("test -b /dev/sda")
    await guest.plug_usb(blank(tmp_path))
    await guest.until("test -b /dev/sdb")
    await guest.sh(f"printf '{TWO}' | sfdisk -q /dev/sdb; udevadm settle")
    await guest.sh("mkfs.ext4 -q /dev/sdb1; mount /dev/sdb1 /mnt; echo here > /mnt/kept")
    await guest.sh("mkfs.ext4 -q /dev/sdb2; udevadm settle")
    planned = await guest.sh(documented("--erase sdb2 --dry-run"))
    assert "- erase /dev/sdb2, which holds ext4 (a filesystem, or a header)" in planned.stdout
    refused = await guest.sh(documented("provision recorder"), check=False)
    assert "say so with --erase sdb2" in refused.stderr
    done = await guest.sh(f"{documented('provision recorder')} --erase sdb2")
    assert done.stdout.startswith("/dev/sdb2: recorder is made")
    await guest.until_mounted("/run/media/recorder")
    assert await guest.read("/mnt/kept") == b"here\n"
    await agent.stop()
    await guest.sh("umount /mnt; rm /data/caam/recorder.bb /etc/caam-hotplug/rules.d/recorder.toml")


async def test_a_medium_of_other_choices_is_mounted_by_the_rule_that_was_written(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.stop()
    await guest.plug_usb(blank(tmp_path))
    await guest.until("test -b /dev/sda")
    command = [
        *("caam-hotplug", "provision", "/dev/sda", "--label", LABEL, "--sector-size", "4096"),
        *("--cipher", "capi:tk(cbc(aes))-plain64", "--key-bytes", "32", "--seal", "ccm"),
        *("--fs", "vfat"),
    ]
    without = await guest.run(*command)
    assert without.stderr == (
        "note: rule 'built-in' will not open it: the medium has another cipher and another "
        "sector_size; the same command with --rule writes one that does\n"
    )
    done = await guest.run(*command, "--rule")
    assert "was made before; nothing was erased" in done.stdout
    assert "built-in one no longer applies" in done.stderr
    await agent.start()
    await guest.until_mounted(POINT)
    await keep_a_file(guest, "in large sectors")


async def test_a_running_agent_reads_the_rule_of_a_medium_that_is_made(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.start()
    await guest.plug_usb(blank(tmp_path))
    await guest.until("test -b /dev/sda")
    done = await guest.run(
        *("caam-hotplug", "provision", "/dev/sda", "--label", LABEL),
        *("--cipher", "capi:tk(cbc(aes))-plain64", "--rule"),
    )
    assert "note: the running agent has read the rule\n" in done.stderr
    await guest.until_mounted(POINT)
    await keep_a_file(guest, "under the rule")
    said = await agent.journal()
    assert said.index("reloaded: 1 rules") < said.index("unlocking: with")
    assert said.count("mounted: at") == 1


UDEVD = ["systemd-udevd", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket"]


async def test_without_udevd_the_kernel_tells_the_agent_of_the_new_medium(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await agent.stop()
    await guest.run("systemctl", "stop", *UDEVD)
    await agent.configure('source = "kernel"\n')
    await agent.start()
    await guest.plug_usb(blank(tmp_path))
    await guest.until("test -b /dev/sda")
    await guest.run("caam-hotplug", "provision", "/dev/sda", "--label", LABEL)
    await guest.until_mounted(POINT)
    await guest.run("systemctl", "start", *UDEVD)


CUTS = {
    "before the blob is synced": "-e trace=fsync -e inject=fsync:signal=KILL:when=1",
    "before its name is synced": "-e trace=fsync -e inject=fsync:signal=KILL:when=2",
    "amid the mark": "-P /dev/sdb -e trace=write -e inject=write:signal=KILL:when=3",
    "before the blob is settled": "-e trace=unlink,unlinkat -e inject=unlinkat:signal=KILL:when=1",
    "amid the filesystem": "-e trace=pwrite64 -e inject=pwrite64:delay_enter=90000000:when=4",
    "amid the label": "-P /dev/sdb -e trace=write -e inject=write:signal=KILL:when=9",
}
OFTEN: Final = ("before the blob is settled", "amid the mark")
"""The cuts tried each time; the soak has all."""


@pytest.mark.parametrize(
    "cut", [pytest.param(c, marks=[] if c in OFTEN else pytest.mark.soak) for c in CUTS]
)
async def test_after_a_power_cut_the_same_command_completes_the_medium(
    tmp_path: Path, cut: str
) -> None:
    """The power is cut when QEMU is killed: what the guest has not synced is lost."""
    store, stick = blank(tmp_path, "store.img", 32), blank(tmp_path)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", store], check=True)
    command = f"caam-hotplug provision /dev/sdb --label {LABEL}"
    async with machine.restored(installed.layer()) as guest:
        await plugged_with_store(guest, store, stick)
        interrupted = f"strace -f -qq -o /dev/null {CUTS[cut]} {command}"
        if cut == "amid the filesystem":
            await guest.sh(f"{interrupted} >/dev/null 2>&1 </dev/null &")
            await guest.until("pgrep mkfs.ext4")
        else:
            assert (await guest.sh(interrupted, check=False)).returncode in {137, -9}
    async with machine.restored(installed.layer()) as guest:
        await plugged_with_store(guest, store, stick)
        done = await guest.sh(command)
        assert done.stdout.startswith(f"/dev/sdb1: {LABEL} ")
        agent = InstalledAgent(guest)
        await agent.start()
        await guest.until_mounted(POINT)
        await keep_a_file(guest, "after all")
        await agent.stop()


AT_TABLE_WRITE: Final = "-e trace=pwritev,pwritev2 -e inject=pwritev,pwritev2:signal=KILL:when="
PARTITION_CUTS = {
    "before the record is synced": "-e trace=fsync -e inject=fsync:signal=KILL:when=1",
    "between the copies of the mark": f"{AT_TABLE_WRITE}2",
    "amid the filesystem": CUTS["amid the filesystem"],
    "before the blob has its name": "-e trace=renameat2 -e inject=renameat2:signal=KILL:when=2",
    "between the copies of the label": f"{AT_TABLE_WRITE}4",
    # The first three look for what a killed run has left of a file.
    "before the record is removed": "-e trace=unlinkat -e inject=unlinkat:signal=KILL:when=4",
}


@pytest.mark.parametrize(
    "cut",
    [
        pytest.param(cut, marks=[] if cut.endswith("of the label") else pytest.mark.soak)
        for cut in PARTITION_CUTS
    ],
)
async def test_after_a_power_cut_the_disk_has_its_partitions_and_the_one_is_completed(
    tmp_path: Path, cut: str
) -> None:
    store, disk = blank(tmp_path, "store.img", 32), blank(tmp_path)
    subprocess.run(["/sbin/mkfs.ext4", "-q", "-F", store], check=True)
    command = "caam-hotplug provision recorder --rule"
    async with machine.restored(installed.layer()) as guest:
        await plugged_with_store(guest, store, disk)
        await guest.sh(f"printf '{TWO}' | sfdisk -q /dev/sdb; udevadm settle")
        await guest.sh("mkfs.ext4 -q /dev/sdb1; mount /dev/sdb1 /mnt")
        await guest.sh("echo here > /mnt/kept; sync -f /mnt/kept")
        interrupted = f"strace -f -qq -o /dev/null {PARTITION_CUTS[cut]} {command}"
        if cut == "amid the filesystem":
            await guest.sh(f"{interrupted} >/dev/null 2>&1 </dev/null &")
            await guest.until("pgrep mkfs.ext4")
        else:
            assert (await guest.sh(interrupted, check=False)).returncode in {137, -9}
    async with machine.restored(installed.layer()) as guest:
        await plugged_with_store(guest, store, disk)
        await guest.until("test -b /dev/sdb2")
        await guest.sh("mount /dev/sdb1 /mnt")
        assert await guest.read("/mnt/kept") == b"here\n"
        done = await guest.sh(command)
        assert done.stdout.startswith("/dev/sdb2: recorder is made")
        agent = InstalledAgent(guest)
        await agent.start()
        await guest.until_mounted("/run/media/recorder")
        await agent.stop()


async def plugged_with_store(guest: Guest, store: Path, stick: Path) -> None:
    """The blobs are on a disk of their own, /dev/sda; the medium is /dev/sdb."""
    await guest.plug_scsi(store)
    await guest.until("test -b /dev/sda")
    await guest.sh("mount /dev/sda /data/caam; chmod 700 /data/caam")
    await guest.plug_usb(stick)
    await guest.until("test -b /dev/sdb")
