"""A USB device is switched off only where it is nothing but the disk that was ejected."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from caam_hotplug.kernel import power
from fakes.contract import until
from kernel.gadgets import SERIAL, stick
from kernel.real import volume_at
from kernel.witness import run

pytestmark = pytest.mark.usefixtures("nothing_left")
PORT = Path("/dev/ttyACM0")


@pytest.fixture
def files() -> Iterator[list[Path]]:
    """Two media of zeros, not plugged."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        made = [Path(folder) / "one", Path(folder) / "two"]
        for file in made:
            file.write_bytes(bytes(1 << 20))
        yield made


def test_a_stick_that_is_one_disk_is_switched_off(files: list[Path]) -> None:
    with stick(files[:1]) as (disk,):
        power.off(volume_at(f"/dev/{disk.name}"))
        until(lambda: not disk.exists())


def test_the_serial_port_of_a_composite_device_stays_and_so_does_the_disk(
    files: list[Path],
) -> None:
    with stick(files[:1], [SERIAL]) as (disk,):
        until(PORT.exists)
        power.off(volume_at(f"/dev/{disk.name}"))
        run("udevadm", "settle")
        assert PORT.exists()
        assert Path(f"/dev/{disk.name}").read_bytes() == bytes(1 << 20)


def test_a_second_unit_of_the_device_stays(files: list[Path]) -> None:
    with stick(files) as disks:
        power.off(volume_at(f"/dev/{disks[0].name}"))
        run("udevadm", "settle")
        assert all(disk.exists() for disk in disks)
