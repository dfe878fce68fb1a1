"""A USB port is switched off only if nothing but the disk is on it; a folder stands for sysfs."""

from __future__ import annotations

from pathlib import Path

import pytest

from caam_hotplug.errors import KernelError
from caam_hotplug.kernel import power

STORAGE = {"1-1:1.0": "08"}


class Tree:
    """A hub with a USB device below it, and /sys/class/block."""

    def __init__(self, folder: Path, interfaces: dict[str, str]) -> None:
        self.blocks = folder / "class"
        self.blocks.mkdir()
        self.hub = folder / "usb1"
        self.device = self.hub / "1-1"
        for usb in (self.hub, self.device):
            usb.mkdir()
            (usb / "busnum").write_text("1\n")
            (usb / "remove").write_text("")
        for name, number in interfaces.items():
            (self.device / name).mkdir()
            (self.device / name / "bInterfaceClass").write_text(f"{number}\n")
        self.disk = self.add_disk("sda", self.add_unit(0))

    def add_unit(self, lun: int, *, type_: str = "0", interface: str = "1-1:1.0") -> Path:
        unit = self.device / interface / "host6" / "target6:0:0" / f"6:0:0:{lun}"
        unit.mkdir(parents=True)
        (unit / "type").write_text(f"{type_}\n")
        return unit

    def add_disk(self, name: str, unit: Path) -> Path:
        disk = unit / "block" / name
        disk.mkdir(parents=True)
        (disk / f"{name}1").mkdir()
        (self.blocks / name).symlink_to(disk)
        (self.blocks / f"{name}1").symlink_to(disk / f"{name}1")
        return disk

    @property
    def removed(self) -> list[Path]:
        return [usb for usb in (self.hub, self.device) if (usb / "remove").read_text() == "1"]


def tree(folder: Path, patch: pytest.MonkeyPatch, other: str | None = None) -> Tree:
    """Make a tree; `other` is the class of a second interface."""
    made = Tree(folder, STORAGE if other is None else {**STORAGE, "1-1:1.1": other})
    patch.setattr(power, "_SYS_BLOCK", made.blocks)
    return made


def test_a_device_that_is_one_disk_is_disconnected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tree(tmp_path, monkeypatch)
    power._switch_port_off(made.disk)
    assert made.removed == [made.device]


def test_the_enclosure_of_a_disk_keeps_no_port_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tree(tmp_path, monkeypatch)
    made.add_unit(1, type_="13")
    power._switch_port_off(made.disk)
    assert made.removed == [made.device]


@pytest.mark.parametrize("number", ["02", "03", "08", "ff"])
def test_an_interface_beside_the_disks_own_keeps_the_port_on_and_is_named(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: str,
) -> None:
    made = tree(tmp_path, monkeypatch, other=number)
    with caplog.at_level("INFO"):
        power._switch_port_off(made.disk)
    assert made.removed == []
    assert f"sda: its port stays on; the device has interface 1-1:1.1 (class {number})" in (
        caplog.messages
    )


def test_another_disk_or_a_tape_of_the_device_keeps_the_port_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tree(tmp_path, monkeypatch)
    tape = made.add_unit(1, type_="1")
    power._switch_port_off(made.disk)
    (tape / "type").unlink()
    made.add_disk("sdb", made.add_unit(2))
    power._switch_port_off(made.disk)
    assert made.removed == []


def test_no_hub_is_disconnected_for_a_device_without_a_switch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tree(tmp_path, monkeypatch)
    (made.device / "remove").unlink()
    power._switch_port_off(made.disk)
    assert (made.hub / "remove").read_text() == ""


def test_a_port_that_cannot_be_switched_off_is_an_error_with_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tree(tmp_path, monkeypatch)
    (made.device / "remove").unlink()
    (made.device / "remove").mkdir()
    with pytest.raises(KernelError, match=rf"^switch off the port of {made.device}: Is a dir"):
        power._switch_port_off(made.disk)
