"""Doctor's report names each fault of the board in a line of its own, with the remedy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from e2e.support import POINT
from vm.guest import Guest
from vm.installed import UNIT, InstalledAgent
from vm.media import KEYS, OTPMK_A, OTPMK_B

LEFT: Final = (
    "dmsetup ls; cat /sys/class/block/loop*/loop/backing_file 2>/dev/null || true; "
    "awk '/caam-doctor/ && $3 != 0' /proc/keys; ls -l --time-style=full-iso /data/caam"
)
"""What a self-test could leave, or change."""
OPTIONS: Final = """
CONFIG_BLK_DEV_DM=m
CONFIG_DM_CRYPT=m
CONFIG_KEYS=y
CONFIG_TMPFS=y
CONFIG_DEVTMPFS=y
CONFIG_EXT4_FS=m
# CONFIG_CRYPTO_DEV_FSL_CAAM is not set
"""


@dataclass(frozen=True, slots=True)
class Report:
    """Doctor's report."""

    status: int
    results: list[dict[str, Any]]

    def of(self, check: str) -> list[tuple[str, str]]:
        """Return the check's lines: status and what was found."""
        return [(r["status"], r["found"]) for r in self.results if r["check"] == check]

    def one(self, check: str) -> tuple[str, str]:
        """Return the check's only line."""
        (line,) = self.of(check)
        return line

    def amiss(self) -> dict[str, str]:
        """Return the checks that have a warning or a failure, with the worst."""
        found: dict[str, str] = {}
        for result in self.results:
            check, status = result["check"], result["status"]
            if status == "failure" or (status == "warning" and check not in found):
                found[check] = status
        return found


async def examined(guest: Guest, before: str = "") -> Report:
    """Run doctor; `before` stands before its name in the shell."""
    done = await guest.sh(f"{before} caam-hotplug doctor --json", check=False, timeout_s=120)
    assert done.stderr == ""
    results = json.loads(done.stdout)["findings"]
    for result in results:
        needs_remedy = result["status"] in {"warning", "failure"}
        assert not needs_remedy or result["remedy"], result
    return Report(done.returncode, results)


@asynccontextmanager
async def broken(guest: Guest, how: str, mended: str) -> AsyncIterator[None]:
    """Break something by a shell script, and mend it by another."""
    await guest.sh(how)
    try:
        yield
    finally:
        await guest.sh(mended)


def as_documented(guest: Guest) -> Any:
    """Make the board as README says: with a kernel's configuration, and blobs that are root's."""
    return broken(
        guest,
        f"mkdir -p /boot; cat > /boot/config-$(uname -r) <<X\n{OPTIONS}\nX\nchmod 700 /data/caam",
        "rm /boot/config-*",
    )


async def test_a_healthy_board_is_reported_as_such_while_the_agent_runs_and_nothing_is_changed(
    guest: Guest, agent: InstalledAgent, medium: Path
) -> None:
    async with as_documented(guest):
        await agent.start()
        await guest.plug_usb(medium)
        await guest.until_mounted(POINT)
        before = (await guest.sh(LEFT)).stdout
        report = await examined(guest)
        await guest.until(f"test \"$({LEFT})\" = '{before.rstrip()}'")
        assert report.amiss() == {}, report.results
        assert report.status == 0
        assert report.one("known-answer") == (
            "ok",
            "a test key went through CAAM, keyring and dm-crypt; both ways as by cbc(aes-generic)",
        )
        assert report.one("blobs")[0] == "ok"
        assert report.one("caam-state")[0] == "unknown"
        assert (
            "done by other drivers: CONFIG_CRYPTO_DEV_FSL_CAAM" in report.one("kernel-options")[1]
        )
        assert await guest.read(f"{POINT}/hello.txt") == b"Encrypted data\n"
        shown = await guest.run("caam-hotplug", "doctor")
        assert shown.stdout.splitlines()[-1].endswith(" ok")
        assert "\x1b" not in shown.stdout
        assert "doctor" not in await agent.journal()


FILES = """
cd /data/caam; chmod 755 .
head -c 60 cartridge-01.bb > damaged.bb
python3 - <<X
blob = bytearray(open("cartridge-01.bb", "rb").read())
blob[50] ^= 4
open("foreign.bb", "wb").write(blob)
X
cp cartridge-01.bb others.bb; chown 1000:1000 others.bb; chmod 600 others.bb
mv /usr/lib/udev/rules.d/50-caam-hotplug.rules /root
echo 'ACTION=="add", SUBSYSTEM=="block", RUN+="/etc/udev/scripts/mount.sh"' \
  > /etc/udev/rules.d/automount.rules
mkdir -p /etc/caam-hotplug
echo 'log_level = "info"' > /etc/caam-hotplug/agent.toml; chmod go+w /etc/caam-hotplug/agent.toml
echo '[Unit]' > /etc/systemd/system/udisks2.service
echo 'PARTLABEL=cartridge-01 /mnt ext4 noauto 0 0' > /etc/fstab
echo 'secret /dev/disk/by-partlabel/cartridge-01 none' > /etc/crypttab
mount --make-private /run
"""
FILES_MENDED = """
mv /root/50-caam-hotplug.rules /usr/lib/udev/rules.d
rm /etc/udev/rules.d/automount.rules /etc/systemd/system/udisks2.service /etc/crypttab
: > /etc/fstab
mount --make-shared /run
udevadm control --reload
"""


async def test_what_is_wrong_in_files_and_mounts_is_named_line_by_line(guest: Guest) -> None:
    async with broken(guest, FILES, FILES_MENDED):
        report = await examined(guest)
    assert report.status == 1
    assert report.amiss() == {
        "configuration": "failure",
        "blob-directory": "warning",
        "blobs": "failure",
        "udev-rule": "failure",
        "mount-propagation": "warning",
        "automounters": "warning",
        "fixed-tables": "warning",
        "service": "warning",
    }
    assert (
        "/etc/caam-hotplug/agent.toml: can be written by others than root"
        in report.one("configuration")[1]
    )
    assert "mode 0755" in report.one("blob-directory")[1]
    damaged, foreign, others, fine = report.of("blobs")
    assert damaged[1].startswith("damaged.bb: read blob /data/caam/damaged.bb: is cut short")
    assert foreign[1].startswith("foreign.bb: the CAAM refused the blob")
    assert others[1] == "others.bb cannot be read by the service"
    assert fine[0] == "ok"
    assert "is not installed" in report.one("udev-rule")[1]
    assert report.one("mount-propagation")[1].startswith("/run is private as PID 1")
    assert [found for _, found in report.of("automounters")] == [
        "/etc/systemd/system/udisks2.service is installed",
        "udev's rule /etc/udev/rules.d/automount.rules mounts what is plugged",
    ]
    fstab, crypttab = report.of("fixed-tables")
    assert fstab[1].startswith("/etc/fstab, line 1: PARTLABEL=cartridge-01 names a label")
    assert crypttab[1].startswith("/etc/crypttab, line 1: /dev/disk/by-partlabel/cartridge-01")
    assert "does not run: inactive" in report.one("service")[1]


NO_CAAM = """
rmmod caam_sim
mkdir -p /etc/caam-hotplug /boot
echo 'CONFIG_CRYPTO_DEV_FSL_CAAM=m' > /boot/config-$(uname -r)
printf '[[rule]]\\nname = "x"\\ncrypt.cipher = "serpent-xts-plain64"\\n' \
  > /etc/caam-hotplug/agent.toml
chown 1000 /etc/caam-hotplug/agent.toml
chmod 777 /data
mv /usr/lib/udev/rules.d/50-caam-hotplug.rules /usr/lib/udev/rules.d/95-caam-hotplug.rules
systemctl mask -q --runtime udisks2.service
echo 'this is no library' > /tmp/libblkid.so.1
"""
NO_CAAM_MENDED = """
modprobe caam_sim {chip}
chmod 755 /data
mv /usr/lib/udev/rules.d/95-caam-hotplug.rules /usr/lib/udev/rules.d/50-caam-hotplug.rules
rm -f /run/systemd/system/udisks2.service /tmp/libblkid.so.1 /boot/config-*
systemctl daemon-reload
"""
CHIP = "cd /sys/module/caam_sim/parameters; echo otpmk=$(cat otpmk) secure=$(cat secure)"


async def test_a_board_without_caam_cipher_and_library_fails(guest: Guest) -> None:
    chip = (await guest.sh(CHIP)).stdout.strip()
    async with broken(guest, NO_CAAM, NO_CAAM_MENDED.format(chip=chip)):
        report = await examined(guest, "LD_LIBRARY_PATH=/tmp")
    assert report.status == 1
    assert report.one("kernel-options")[0] == "failure"
    assert report.one("kernel-options")[1].endswith(
        "does not set CONFIG_CRYPTO_DEV_FSL_CAAM_JR, CONFIG_CRYPTO_DEV_FSL_CAAM_CRYPTO_API, "
        "CONFIG_CRYPTO_DEV_FSL_CAAM_TK_API"
    )
    assert report.one("caam-device") == (
        "failure",
        "/dev/caam-keygen is not there, and there are no trusted keys either",
    )
    assert report.one("caam-algorithms") == ("failure", "the kernel has none of the CAAM")
    assert report.one("ciphers") == (
        "failure",
        "xts(serpent) is not there; rules need it for serpent-xts-plain64",
    )
    assert report.one("known-answer")[0] == "unknown"
    assert report.one("libraries")[1].startswith("libblkid.so.1 cannot be loaded")
    assert "belongs to user 1000, not to root" in report.one("configuration")[1]
    assert "/data can be written by others than root" in report.one("blob-directory")[1]
    assert {status for status, _ in report.of("blobs")} == {"unknown"}
    assert "comes after 55-dm.rules, too late" in report.one("udev-rule")[1]
    assert report.one("automounters")[0] == "ok"


async def test_with_a_mistake_in_the_configuration_what_it_configures_is_unknown(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.configure('mount_rot = "/media"\n')
    report = await examined(guest)
    assert report.status == 1
    assert report.one("configuration")[1].endswith(
        "/etc/caam-hotplug/agent.toml: mount_rot: is not a key here; did you mean 'mount_root'?"
    )
    for check in ("blob-directory", "blobs", "mount-root", "udevd", "udev-rule", "fixed-tables"):
        assert report.one(check) == ("unknown", "the configuration cannot be read, see its line")


NO_KERNEL = """
echo 'install dm-crypt /bin/false' > /etc/modprobe.d/no-crypt.conf
modprobe -r dm_crypt
cat /proc/sys/kernel/keys/root_maxkeys > /tmp/maxkeys
echo 1 > /proc/sys/kernel/keys/root_maxkeys
kill -STOP $(pidof systemd-udevd)
"""
NO_KERNEL_MENDED = """
rm /etc/modprobe.d/no-crypt.conf
modprobe dm_crypt
cat /tmp/maxkeys > /proc/sys/kernel/keys/root_maxkeys
kill -CONT $(pidof systemd-udevd)
"""


async def test_a_kernel_without_dm_crypt_and_room_for_keys_and_a_stopped_udevd(
    guest: Guest,
) -> None:
    async with broken(guest, NO_KERNEL, NO_KERNEL_MENDED):
        report = await examined(guest)
    assert report.status == 1
    assert report.one("dm-crypt") == (
        "failure",
        "the kernel has no target `crypt`, and loading its module did not help",
    )
    assert report.one("keys")[0] == "failure"
    assert "Disk quota exceeded" in report.one("keys")[1]
    assert report.one("known-answer")[0] == "failure"
    assert report.one("udevd")[0] == "failure"
    assert "is stopped" in report.one("udevd")[1]


async def test_dm_crypt_without_the_key_is_a_failure_of_the_known_answer(guest: Guest) -> None:
    how = "echo 'install dm-crypt /bin/false' > /etc/modprobe.d/no.conf; modprobe -r dm_crypt"
    async with broken(guest, how, "rm /etc/modprobe.d/no.conf; modprobe dm_crypt"):
        report = await examined(guest)
    assert report.one("known-answer")[1].startswith("dm-crypt does not take the CAAM's key")


OWN_NAMESPACE = f"/run/systemd/system/{UNIT}.d/own.conf"


async def test_a_service_that_mounts_for_itself_alone_is_a_failure(
    guest: Guest, agent: InstalledAgent
) -> None:
    await guest.write(OWN_NAMESPACE, b"[Service]\nPrivateMounts=yes\n")
    async with broken(
        guest, "systemctl daemon-reload", f"rm {OWN_NAMESPACE}; systemctl daemon-reload"
    ):
        await agent.start()
        report = await examined(guest)
        await agent.stop()
    assert report.one("mount-propagation") == (
        "failure",
        "the service has a mount namespace of its own; what it mounts nobody else sees",
    )
    assert report.one("sockets")[0] == "ok"


async def test_a_service_that_failed_a_socket_that_is_missing_and_no_udevd(
    guest: Guest, agent: InstalledAgent
) -> None:
    await agent.configure('log_level = "info"\n')
    await guest.sh(
        f"chmod go+w /etc/caam-hotplug/agent.toml; systemctl restart {UNIT}", check=False
    )
    how = (
        "mv /usr/lib/systemd/system/caam-hotplug.socket /root; "
        "mv /usr/lib/systemd/system/caam-hotplug-holders.socket /root; systemctl daemon-reload; "
        "systemctl stop systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd"
    )
    # A socket whose file was away at a reload has lost what it listened on.
    mended = (
        "mv /root/caam-hotplug*.socket /usr/lib/systemd/system; "
        "systemctl daemon-reload; systemctl restart caam-hotplug-holders.socket; "
        "systemctl start systemd-udevd-control.socket systemd-udevd-kernel.socket systemd-udevd"
    )
    async with broken(guest, how, mended):
        report = await examined(guest)
    assert "has failed" in report.one("service")[1]
    assert [status for status, _ in report.of("sockets")] == ["failure", "warning"]
    assert report.one("udevd")[0] in {"failure", "warning"}
    assert "udevd does not run" in report.one("udevd")[1]


async def test_on_another_board_every_blob_is_void_and_nothing_else_fails(
    guest: Guest, agent: InstalledAgent
) -> None:
    await guest.cold_boot_caam(OTPMK_B)
    await guest.sh("echo '[Unit]' > /etc/systemd/system/udisks2.service")
    async with as_documented(guest):
        await agent.start()
        report = await examined(guest)
        await guest.sh("rm /data/caam/*.bb; cd /data/caam; caam-keygen create mine ecb -s 16")
        mended = await examined(guest)
        await agent.stop()
    await guest.sh("rm /etc/systemd/system/udisks2.service")
    await guest.cold_boot_caam(OTPMK_A)
    assert report.status == 1
    assert report.amiss() == {"blobs": "failure", "automounters": "warning"}
    assert len(report.of("blobs")) == len(KEYS)
    assert all("the CAAM refused the blob" in found for _, found in report.of("blobs"))
    assert mended.amiss() == {"automounters": "warning"}
    assert mended.status == 3


async def test_killed_in_the_middle_it_leaves_what_the_next_run_removes(guest: Guest) -> None:
    await guest.sh(
        "strace -f -qq -o /dev/null -e trace=fsync -e inject=fsync:signal=KILL "
        "caam-hotplug doctor --json || test $? -gt 128",
        timeout_s=120,
    )
    assert "caam-doctor-" in (await guest.run("dmsetup", "ls")).stdout
    report = await examined(guest)
    first, second = report.of("known-answer")
    assert first[1].startswith("a killed doctor had left caam-doctor-")
    assert second[0] == "ok"
    await guest.until("test \"$(dmsetup ls)\" = 'No devices found'")
    await guest.until("! ls /sys/class/block/loop*/loop")


async def test_terminated_in_the_middle_it_leaves_nothing(guest: Guest) -> None:
    done = await guest.sh(
        "strace -f -qq -o /dev/null -e trace=fsync -e inject=fsync:signal=TERM "
        "caam-hotplug doctor --json",
        check=False,
        timeout_s=120,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "caam-hotplug: examine the board: interrupted\n"
    await guest.until("test \"$(dmsetup ls)\" = 'No devices found'")
    await guest.until("! ls /sys/class/block/loop*/loop")


async def test_ciphertext_that_is_not_aes_is_a_failure(guest: Guest) -> None:
    # strace falsifies what AES in software says, as if the CAAM's cipher were another one.
    done = await guest.sh(
        "strace -f -qq -o /dev/null -e trace=recvfrom "
        "-e inject=recvfrom:poke_exit=@arg2=00ff00ff caam-hotplug doctor --json",
        check=False,
        timeout_s=120,
    )
    report = Report(done.returncode, json.loads(done.stdout)["findings"])
    assert report.one("known-answer") == (
        "failure",
        "what dm-crypt writes with `capi:tk(cbc(aes))-plain` is not what cbc(aes-generic) makes "
        "of the same key",
    )
