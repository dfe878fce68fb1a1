"""A medium that must not be unlocked is refused with a reason, and is not changed."""

from __future__ import annotations

from pathlib import Path

from e2e.support import ANY_BUS, labelled
from vm import media
from vm.guest import Guest
from vm.installed import UNIT, InstalledAgent

BLOB_FAULTS = """
cd /data/caam
head -c 60 cartridge-01.bb > cartridge-truncated.bb
python3 - <<X
blob = bytearray(open("cartridge-01.bb", "rb").read())
blob[50] ^= 4
open("cartridge-flipped.bb", "wb").write(blob)
blob[50] ^= 4
blob[8] = 5
open("cartridge-trusted.bb", "wb").write(blob)
X
mkfifo cartridge-fifo.bb
mkdir cartridge-directory.bb
cp cartridge-01.bb /root/elsewhere.bb
ln -s /root/elsewhere.bb cartridge-symlink.bb
dd if=/dev/zero of=cartridge-huge.bb bs=1M count=10 status=none
head -c 96 /dev/urandom > cartridge-noise.bb
caam-keygen create cartridge-wrong ecb -t 'another 16 bytes'; rm cartridge-wrong
"""
MESSAGES = {
    "missing": "waiting: no blob /data/caam/cartridge-missing.bb",
    "truncated": "failed: read blob /data/caam/cartridge-truncated.bb: is cut short or damaged: "
    "60 bytes, the tag header says 96",
    "flipped": "failed: the CAAM refused the blob: damaged, sealed on another chip, or sealed in "
    "another security state of this one",
    "trusted": "failed: read blob /data/caam/cartridge-trusted.bb: has tag type 5: black key, ECB, "
    "for trusted descriptors; tk(...) needs a black key, type 1 (ECB) or 9 (CCM)",
    "fifo": "failed: read blob /data/caam/cartridge-fifo.bb: is not a regular file",
    "directory": "failed: read blob /data/caam/cartridge-directory.bb: is not a regular file",
    "symlink": "failed: read blob /data/caam/cartridge-symlink.bb: is a symbolic link",
    "huge": "failed: read blob /data/caam/cartridge-huge.bb: has 10485760 bytes, "
    "a blob at most 4096",
    "noise": "failed: read blob /data/caam/cartridge-noise.bb: is no blob: neither one of "
    "caam-keygen (no tag header), nor what keyctl pipe prints of a trusted or an encrypted key; a "
    "raw one of a trusted key needs backend = 'trusted'",
    "wrong": "failed: no known filesystem under this key (looked for ext4, xfs, btrfs, f2fs, "
    "vfat, exfat): /data/caam/cartridge-wrong.bb may belong to another medium",
}


async def test_every_fault_of_a_blob_has_its_own_message_and_leaves_the_medium_untouched(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    await guest.sh(BLOB_FAULTS)
    await agent.configure(ANY_BUS)
    await agent.start()
    media_of = {fault: labelled(tmp_path, f"cartridge-{fault}") for fault in MESSAGES}
    before = {fault: media.partition_bytes(image) for fault, image in media_of.items()}
    plugs = [await guest.plug_scsi(image) for image in media_of.values()]
    await agent.until_said("'cartridge-[a-z]+' .*(waiting|failed): ", times=len(MESSAGES))
    journal = await agent.journal()
    messages = {
        fault: next(line for line in journal.splitlines() if f"'cartridge-{fault}'" in line
                    and ("waiting" in line or "failed" in line)).split("): ", 1)[1]
        for fault in MESSAGES
    }  # fmt: skip
    assert messages == MESSAGES
    assert await agent.leftovers() == []
    for plug in plugs:
        await plug.pull()
    assert {fault: media.partition_bytes(image) for fault, image in media_of.items()} == before


EXPOSURE = 30
"""Tenths of the value of `systemd-analyze security`; docs/reliability.md explains the rest."""
TRACED = f"/run/systemd/system/{UNIT}.d/traced.conf"
HOSTILE = ["../../etc", ".", "-rf", "line\nbreak", "%s%n", "a/b", "Ω" * 36, "cartridge 01"]


async def test_hostile_labels_are_ignored_with_the_reason_and_lead_to_no_file(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    # strace stops the agent at every call, which makes it slower than any watchdog permits.
    await guest.write(TRACED, b"[Service]\nWatchdogSec=0\n")
    await guest.sh("systemctl daemon-reload")
    await agent.configure('[[rule]]\nname = "all"\nmatch.bus = "scsi"\n')
    await agent.start()
    pid = await agent.main_pid()
    await guest.sh(
        f"strace -f -qq -p {pid} -o /tmp/trace -e trace=open,openat,openat2,mkdir,mkdirat,"
        "symlinkat,mknodat,renameat2,move_mount >/dev/null 2>&1 & "
        f"until grep -q 'TracerPid:.*[1-9]' /proc/{pid}/status; do :; done"
    )
    for label in HOSTILE:
        await guest.plug_scsi(labelled(tmp_path, label, size_mib=4))
    await agent.until_said("1\\): ignored: all: partlabel", times=len(HOSTILE), deadline_s=400)
    journal = await agent.journal()
    for label in HOSTILE:
        assert f"partlabel {label!a} cannot be part of a file name" in journal
    trace = (await guest.run("cat", "/tmp/trace")).stdout
    assert trace
    paths = [line.split('"')[1] for line in trace.splitlines() if line.count('"') >= 2]
    made = [line for line in trace.splitlines() if "mkdir" in line or "move_mount" in line]
    assert made == []
    # The kernel's names lead to sysfs files of a device, below a descriptor; a label leads to none.
    of_devices = ("/sys/", "class/block/", "devices/", "/run/udev/data/", "/proc/")
    assert {path for path in paths if not path.startswith(of_devices)} == set()
    await agent.stop()
    await guest.sh(f"rm {TRACED}; systemctl daemon-reload")


async def test_a_mount_point_with_content_is_never_shadowed(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.write("/run/media/cartridge-01/mine", b"the board's own\n")
    await agent.start()
    await guest.plug_usb(medium)
    log = await agent.until_said("conflict")
    assert "/run/media/cartridge-01 is not empty" in log
    assert await guest.read("/run/media/cartridge-01/mine") == b"the board's own\n"
    assert (await guest.run("dmsetup", "ls")).stdout.strip() == "No devices found"
    await guest.sh("rm -r /run/media/cartridge-01")


async def test_a_mount_point_that_is_a_link_is_never_followed(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh("mkdir -p /run/media /root/target; ln -s /root/target /run/media/cartridge-01")
    await agent.start()
    await guest.plug_usb(medium)
    assert "/run/media/cartridge-01 is a link or a file" in await agent.until_said("conflict")
    assert "/root/target" not in (await guest.run("cat", "/proc/self/mountinfo")).stdout
    await guest.sh("rm /run/media/cartridge-01")


async def test_a_blob_directory_that_others_may_write_to_is_refused(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh("chmod 777 /data")
    await agent.start()
    await guest.plug_usb(medium)
    log = await agent.until_said("failed")
    assert "open /data/caam: /data can be written by others than root" in log
    await guest.sh("chmod 755 /data")


async def test_a_blob_directory_that_the_service_cannot_read_fails_only_its_own_media(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.sh("chown 1000 /data/caam; chmod 700 /data/caam")
    await agent.start()
    await guest.plug_usb(medium)
    log = await agent.until_said("'cartridge-01'.*failed")
    assert "/data/caam belongs to user 1000 with mode 0700, and cannot be opened" in log
    assert "chown root /data/caam" in log
    await guest.sh("chown 0 /data/caam")
    await guest.sh("caam-hotplug retry cartridge-01")
    await guest.until_mounted("/run/media/cartridge-01")


async def test_a_medium_without_encryption_is_not_mounted_by_mistake(
    guest: Guest, agent: InstalledAgent, tmp_path: Path
) -> None:
    image = labelled(tmp_path, "cartridge-01", key=None)
    before = media.partition_bytes(image)
    await agent.start()
    stick = await guest.plug_usb(image)
    await agent.until_said("failed: no known filesystem under this key")
    await stick.pull()
    assert media.partition_bytes(image) == before


async def test_a_medium_that_udev_cannot_read_is_known_by_its_table_and_others_are_served(
    guest: Guest, agent: InstalledAgent, medium: Path, tmp_path: Path
) -> None:
    # udev then has no facts of the partition, not even the label, which the table has.
    await agent.start()
    broken = labelled(tmp_path, "cartridge-02")
    await guest.plug_usb(broken, bad_sector=media.FIRST_LBA)
    await agent.until_said("'cartridge-02' .*waiting: no blob")
    await guest.plug_usb(medium)
    await guest.until_mounted("/run/media/cartridge-01")


async def test_the_service_has_no_more_exposure_than_mounting_needs(guest: Guest) -> None:
    done = await guest.run(
        "systemd-analyze", "security", "--no-pager", f"--threshold={EXPOSURE}", UNIT, check=False
    )
    assert done.returncode == 0, done.stdout


async def test_a_faulty_configuration_prevents_the_start_and_the_error_names_the_place(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.configure('[[rule]]\nname = "x"\nmatch.partlable = "cartridge-*"\n')
    started = await guest.run("systemctl", "restart", "caam-hotplug", check=False)
    assert started.returncode != 0
    assert (
        "/etc/caam-hotplug/agent.toml: rule[1].match.partlable: is not a key here; "
        "did you mean 'partlabel'?"
    ) in await agent.journal()


async def test_check_and_explain_show_what_the_agent_would_do(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    await guest.plug_usb(medium)
    await guest.until("test -b /dev/disk/by-partlabel/cartridge-01")
    explained = await guest.run("caam-hotplug", "explain", "/dev/disk/by-partlabel/cartridge-01")
    assert "rule 'built-in' matches it" in explained.stdout
    assert "blob        /data/caam/cartridge-01.bb" in explained.stdout
    assert "mount point /run/media/cartridge-01 (nosuid,nodev,noexec)" in explained.stdout
    whole = await guest.run("caam-hotplug", "explain", "/dev/sda")
    assert "rule 'built-in': partlabel is not there" in whole.stdout
    await agent.configure(ANY_BUS)
    checked = await guest.run("caam-hotplug", "check", "/etc/caam-hotplug/agent.toml")
    assert checked.stdout == (
        "/etc/caam-hotplug/agent.toml: valid; rules in the order they are asked: any bus\n"
    )
