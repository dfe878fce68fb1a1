"""How `measure replug` finds a medium's slot, and how it tells what it has measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import pytest

from caam_hotplug.model import Bus
from measure.replug.cycle import spans
from measure.replug.medium import has_key
from measure.replug.report import figures, table
from measure.replug.slot import Slot, slot_of

KEYS: Final = """\
0dcfb9b9 I--Q---     1 perm 3f030000     0     0 logon     caam-hotplug:9-1: 36
1a39e171 I--Q---     0 perm 1f3f0000     0 65534 trusted   caam-hotplug:10-1: 64
2b49e172 I--Q---     2 perm 1f3f0000     0 65534 keyring   _uid.0: empty
"""
MOMENTS: Final = {
    "plugged": 1.0,
    "kernel add": 1.5,
    "mounted": 1.6,
    "udev add": 1.7,
    "removed": 2.0,
    "unmounted": 2.25,
    "nothing left": 2.5,
}


def made(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def test_a_stick_goes_by_the_device_not_by_its_interface_or_the_hub(tmp_path: Path) -> None:
    stick = tmp_path / "usb1" / "1-1"
    disk = stick / "1-1:1.0" / "host6" / "target6:0:0" / "6:0:0:0" / "block" / "sda"
    made(disk / "dev", disk.parents[1] / "delete", stick / "1-1:1.0" / "authorized")
    made(*(up / name for up in (stick, stick.parent) for name in ("busnum", "authorized")))
    switch = stick / "authorized"
    assert slot_of(disk, Bus.USB) == Slot(stick, (switch, "0"), (switch, "1"))


def test_a_scsi_disk_is_looked_for_where_it_was(tmp_path: Path) -> None:
    host = tmp_path / "host12"
    device = host / "target12:0:3" / "12:0:3:1"
    made(device / "delete", device / "block" / "sdb" / "dev")
    slot = slot_of(device / "block" / "sdb", Bus.SCSI)
    assert slot.folder == device
    assert slot.pull == (device / "delete", "1")
    assert slot.plug == (host / "scsi_host" / "host12" / "scan", "0 3 1")


def test_a_card_goes_with_its_slots_controller(tmp_path: Path) -> None:
    driver = tmp_path / "drivers" / "sdhci-esdhc-imx"
    controller = tmp_path / "soc" / "30b50000.mmc"
    disk = controller / "mmc_host" / "mmc1" / "mmc1:aaaa" / "block" / "mmcblk1"
    made(driver / "unbind", disk / "dev")
    (controller / "driver").symlink_to(driver)
    slot = slot_of(disk, Bus.MMC)
    assert slot.folder == controller
    assert slot.pull == (driver / "unbind", "30b50000.mmc")
    assert slot.plug == (driver / "bind", "30b50000.mmc")


def test_what_software_cannot_pull_has_no_slot(tmp_path: Path) -> None:
    assert slot_of(tmp_path / "nvme0" / "nvme0n1", Bus.NVME) is None
    assert slot_of(tmp_path / "mmc1" / "mmcblk1", Bus.MMC) is None


def test_a_key_is_there_until_nobody_uses_it() -> None:
    assert has_key(KEYS, "caam-hotplug:9-1")
    assert not has_key(KEYS, "caam-hotplug:9")
    assert not has_key(KEYS, "caam-hotplug:10-1")


def test_a_medium_that_was_mounted_before_udev_told_has_a_share_above_one() -> None:
    found = spans(MOMENTS)
    assert found["udev add -> mounted, ms"] == pytest.approx(-100)
    assert found["udev's share of kernel add -> mounted"] == pytest.approx(2)
    assert found["removed -> nothing left, ms"] == pytest.approx(500)
    assert "removed -> key gone, ms" not in found


def test_without_udev_and_by_hand_there_are_fewer_times() -> None:
    moments = {name: at for name, at in MOMENTS.items() if name not in {"udev add", "plugged"}}
    assert list(spans(moments)) == [
        "kernel add -> mounted, ms",
        "removed -> unmounted, ms",
        "removed -> nothing left, ms",
    ]


def test_figures_are_of_those_cycles_that_have_them() -> None:
    samples = [{"a": float(value)} for value in range(1, 20)] + [{"a": 100.0, "b": 7.0}]
    assert figures(samples) == {
        "a": {"median": 10.5, "p95": 19.0, "min": 1.0, "max": 100.0},
        "b": {"median": 7.0, "p95": 7.0, "min": 7.0, "max": 7.0},
    }


def test_the_table_says_on_what_it_was_measured_as_far_as_that_is_known() -> None:
    report: dict[str, Any] = {
        "date": "2026-11-25", "machine": "NXP i.MX8MPlus EVK board", "soc": None,
        "architecture": "aarch64", "kernel": "6.6.23", "cpus": 4, "governor": "performance",
        "caam_hotplug": "0.1.0", "python": "3.11.2", "systemd": None, "await_udev": None,
        "bus": "usb", "usb_mbit_s": "480", "model": None, "size_mb": 8000, "filesystem": "ext4",
        "cycles": 20, "by_hand": False,
        "figures": {"a span, ms": {"median": 1.234, "p95": 12.34, "min": -1, "max": 1234}},
    }  # fmt: skip
    first, second, third, _, heads, row = table(report).splitlines()
    assert first == (
        "2026-11-25, NXP i.MX8MPlus EVK board, aarch64, Linux 6.6.23, 4 CPUs, governor performance"
    )
    assert second == "caam-hotplug 0.1.0, Python 3.11.2, await_udev unknown"
    assert third == "usb, 480 Mbit/s, 8000 MB, ext4, 20 cycles by software"
    assert heads.split() == ["median", "p95", "min", "max"]
    assert row.split()[-4:] == ["1.23", "12.3", "-1.00", "1234"]
