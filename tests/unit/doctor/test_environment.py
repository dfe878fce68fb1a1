"""Checks of the environment."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Final

import pytest

from caam_hotplug.config.loader import Config
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import MountSettings, Rule
from caam_hotplug.config.templates import PathTemplate
from caam_hotplug.doctor import environment
from caam_hotplug.doctor.result import Status
from unit.doctor.boards import BoardFiles

RULE: Final = (Path(__file__).parents[3] / "rules/50-caam-hotplug.rules").read_text()


def test_udevd_runs_or_is_stopped_or_not_there(board: BoardFiles) -> None:
    (absent,) = board.seen(environment.udevd)
    assert absent.status is Status.WARNING
    board.has("/run/udev/control")
    assert board.status(environment.udevd) is Status.FAILURE
    assert board.status(environment.udevd, Config(source="kernel")) is Status.OK
    board.runs("systemd-udevd", state="T")
    (stopped,) = board.seen(environment.udevd)
    assert stopped.found.startswith("udevd (process 77) is stopped")
    board.runs("systemd-udevd")
    assert board.status(environment.udevd) is Status.OK


def test_the_rule_counts_by_what_is_in_it_and_where_it_stands(board: BoardFiles) -> None:
    check = environment.udev_rule
    assert board.status(check) is Status.FAILURE
    assert board.status(check, Config(source="kernel")) is Status.OK
    shipped = board.has("/usr/lib/udev/rules.d/50-caam-hotplug.rules", RULE)
    assert board.status(check) is Status.OK
    hidden = board.has("/etc/udev/rules.d/50-caam-hotplug.rules")
    (masked,) = board.seen(check)
    assert masked.found.startswith("/etc/udev/rules.d/50-caam-hotplug.rules hides")
    hidden.write_text(RULE.replace("UDISKS_IGNORE", "X"))
    (other,) = board.seen(check)
    assert "is another version" in other.found
    hidden.unlink()
    shipped.rename(shipped.with_name("90-caam-hotplug.rules"))
    (late,) = board.seen(check)
    assert "90-caam-hotplug.rules comes after 55-dm.rules" in late.found


def test_the_rule_stands_before_device_mappers_own_whatever_its_number(board: BoardFiles) -> None:
    rule = board.has("/usr/lib/udev/rules.d/50-caam-hotplug.rules", RULE)
    board.has("/usr/lib/udev/rules.d/10-dm.rules", "# device-mapper's\n")
    (late,) = board.seen(environment.udev_rule)
    assert late.found.startswith("/usr/lib/udev/rules.d/50-caam-hotplug.rules comes after 10-dm.")
    assert late.remedy.startswith("name it 09-caam-hotplug.rules")
    rule.rename(rule.with_name("09-caam-hotplug.rules"))
    assert board.status(environment.udev_rule) is Status.OK


MOUNTS = """\
31 1 0:23 / / rw shared:1 - overlay none rw
35 31 0:29 / /run rw,nosuid {run}- tmpfs tmpfs rw
90 35 0:40 / /run/media rw - tmpfs tmpfs rw
91 35 0:41 / /run/media rw {media}- tmpfs tmpfs rw
"""


def test_the_last_mount_at_a_point_is_the_one_that_counts() -> None:
    mounts = environment.shared_mounts(MOUNTS.format(run="master:3 shared:11 ", media="shared:7 "))
    assert mounts == {"/": "shared:1", "/run": "shared:11", "/run/media": "shared:7"}
    assert environment.covering(PurePosixPath("/run/media/x"), mounts) == (
        "/run/media",
        "shared:7",
    )
    assert environment.covering(PurePosixPath("/mnt"), mounts) == ("/", "shared:1")
    assert environment.shared_mounts("noise\n") == {}


def test_a_private_mount_below_the_mount_root_is_a_warning(board: BoardFiles) -> None:
    assert board.status(environment.propagation) is Status.UNKNOWN
    board.has("/proc/1/mountinfo", MOUNTS.format(run="", media="shared:7 "))
    assert board.status(environment.propagation) is Status.OK
    board.has("/proc/1/mountinfo", MOUNTS.format(run="", media=""))
    (verdict,) = board.seen(environment.propagation)
    assert verdict.status is Status.WARNING
    assert verdict.remedy == "mount --make-rshared /run/media"


def test_a_private_mount_above_the_path_of_a_rule_is_a_warning(board: BoardFiles) -> None:
    mounts = "31 1 8:1 / / rw shared:1 - ext4 /dev/a rw\n32 31 8:2 / /srv rw {}- ext4 /dev/b rw\n"
    recorder = Rule(name="r", mount=MountSettings(path=PathTemplate("/srv/recorder")))
    config = Config(rule=(recorder,))
    board.has("/proc/1/mountinfo", mounts.format("shared:2 "))
    assert board.status(environment.propagation, config) is Status.OK
    board.has("/proc/1/mountinfo", mounts.format(""))
    (verdict,) = board.seen(environment.propagation, config)
    assert verdict.remedy == "mount --make-rshared /srv"


def test_automounters_are_found_running_installed_and_as_rules_of_udev(board: BoardFiles) -> None:
    check = environment.automounters
    (board.root / "etc/systemd/system").mkdir(parents=True)
    (board.root / "etc/systemd/system/autofs.service").symlink_to("/dev/null")
    board.has("/lib/systemd/system/autofs.service", "[Unit]\n")
    board.has(
        "/lib/udev/rules.d/99-systemd.rules",
        'KERNEL=="fuse", ENV{SYSTEMD_WANTS}+="sys-fs-fuse-connections.mount"\n# RUN="mount"\n',
    )
    assert board.status(check) is Status.OK
    board.runs("udisksd")
    board.has("/lib/systemd/system/udiskie.service", "[Unit]\n")
    board.has("/etc/udev/rules.d/automount.rules", 'ACTION=="add", RUN+="/etc/udev/mount.sh"\n')
    board.has("/etc/udev/rules.d/m.rules", 'ENV{SYSTEMD_WANTS}+="usb-mount@%k.service"\n')
    found = [verdict.found for verdict in board.seen(check)]
    assert found == [
        "udisksd runs (process 77)",
        "/lib/systemd/system/udiskie.service is installed",
        "udev's rule /etc/udev/rules.d/automount.rules mounts what is plugged",
        "udev's rule /etc/udev/rules.d/m.rules mounts what is plugged",
    ]


MOUNT_ROOT = Path("/run/media")
PATHS = [PathTemplate("/srv/recorder"), PathTemplate("/data/{partlabel}")]


@pytest.mark.parametrize(
    "line",
    [
        "PARTLABEL=cartridge-01 /mnt ext4 defaults 0 0",
        "/dev/disk/by-partlabel/cartridge-01 /mnt ext4 defaults 0 0",
        'LABEL="cartridge-01" /mnt ext4 defaults 0 0',
        "secret PARTLABEL=cartridge-01 none luks",
        "/dev/sda1 /run/media/card ext4 defaults 0 0",
        "/dev/mapper/caam-cartridge-01-9-1 /mnt ext4 defaults 0 0",
        "/dev/sda1 /srv/recorder ext4 defaults 0 0",
        "/dev/sda1 /data/cartridge-01 ext4 defaults 0 0",
    ],
)
def test_a_line_about_our_media_is_found(line: str) -> None:
    assert environment.about_our_media(line, ["cartridge-*"], MOUNT_ROOT, PATHS) is not None


@pytest.mark.parametrize(
    "line",
    [
        "",
        "# PARTLABEL=cartridge-01 /mnt ext4 defaults 0 0",
        "PARTLABEL=root / ext4 defaults 0 0",
        "tmpfs /run/media tmpfs defaults 0 0",
        "UUID=cartridge-01 /mnt ext4 defaults 0 0",
        "/dev/sda1 /srv ext4 defaults 0 0",
        "/dev/sda1 /data ext4 defaults 0 0",
        "word",
    ],
)
def test_a_line_about_something_else_is_left_alone(line: str) -> None:
    assert environment.about_our_media(line, ["cartridge-*"], MOUNT_ROOT, PATHS) is None


def test_labels_come_from_blobs_and_from_rules_that_say_more_than_any(board: BoardFiles) -> None:
    board.has("/data/caam/card.bb")
    board.has("/etc/fstab", "PARTLABEL=card /a\nPARTLABEL=log-1 /b\nPARTLABEL=root /\n")
    rules = (
        Rule(name="logs", match=Match(partlabel=("log-*", "?*"))),
        Rule(name="any", match=Match(partlabel="?*")),
    )
    found = [
        v.found.split(":")[0] for v in board.seen(environment.fixed_tables, Config(rule=rules))
    ]
    assert found == ["/etc/fstab, line 1", "/etc/fstab, line 2"]
