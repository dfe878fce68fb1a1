"""Events of block devices as they come from the kernel and from udevd."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel import sysfs, udev
from caam_hotplug.kernel.udev import Devices, Source
from caam_hotplug.model import Appeared, Bus, DevType, Disappeared, Event, EventsLost
from kernel.witness import Medium, loop_medium, run

pytestmark = pytest.mark.usefixtures("nothing_left")

STORM = 300
DEADLINE_S = 60

both_sources = pytest.mark.parametrize("source", ["udev", "kernel"])


@contextmanager
def listening(source: Source) -> Iterator[Devices]:
    devices = Devices(source)
    try:
        yield devices
    finally:
        devices.close()


def change(name: str) -> None:
    """Have the kernel report the device as changed."""
    (Path("/sys/class/block") / name / "uevent").write_text("change")


def shrink(devices: Devices) -> None:
    """Make the sockets' buffers as small as they get."""
    for fileno in devices.readers():
        with socket.socket(fileno=os.dup(fileno)) as same:
            same.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)


def read(devices: Devices) -> list[Event]:
    """Read the events that wait, of all sources."""
    return [event for read_some in devices.readers().values() for event in read_some()]


def await_event(devices: Devices, wanted: Callable[[Event], bool]) -> list[Event]:
    """Read events up to one that is wanted. Raises: AssertionError after a deadline."""
    poller = select.poll()
    for fileno in devices.readers():
        poller.register(fileno, select.POLLIN)
    end = time.monotonic() + DEADLINE_S
    seen: list[Event] = []
    while True:
        left = end - time.monotonic()
        assert left > 0, f"only these came: {seen}"
        poller.poll(left * 1000)
        for event in read(devices):
            seen.append(event)
            if wanted(event):
                return seen


def appearance_of(medium: Medium) -> Callable[[Event], bool]:
    name = Path(medium.device).name
    return lambda event: isinstance(event, Appeared) and event.volume.name == name


@both_sources
def test_a_mediums_arrival_and_departure_are_reported(source: Source) -> None:
    with listening(source) as devices:
        with loop_medium(1 << 20) as medium:
            *_, event = await_event(devices, appearance_of(medium))
            name = Path(medium.device).name
        await_event(devices, lambda event: event == Disappeared(name))
    assert isinstance(event, Appeared)
    volume = event.volume
    assert (volume.bus, volume.devtype, volume.size) == (Bus.LOOP, DevType.DISK, 2048)
    assert volume.identified is (source == "udev")


@both_sources
def test_after_an_overflow_the_loss_is_reported_and_later_events_come(source: Source) -> None:
    with loop_medium(1 << 20) as medium, listening(source) as devices:
        shrink(devices)
        for _ in range(STORM):
            change(Path(medium.device).name)
        run("udevadm", "settle")
        await_event(devices, lambda event: isinstance(event, EventsLost))
        while read(devices):
            pass
        change(Path(medium.device).name)
        await_event(devices, appearance_of(medium))


def test_a_storm_is_read_in_portions(udev_rule: None) -> None:
    with loop_medium(1 << 20) as medium, listening("kernel") as devices:
        for _ in range(100):
            change(Path(medium.device).name)
        assert len(devices.read_kernel()) <= 8
        assert devices.read_kernel()


@both_sources
def test_what_is_there_is_found_without_an_event(source: Source) -> None:
    with loop_medium(1 << 20) as medium, listening(source) as devices:
        run("udevadm", "settle")
        found = (event for event in devices.present() if isinstance(event, Appeared))
        names = {event.volume.name for event in found}
        assert Path(medium.device).name in names
        assert {"vda", "vdb"} <= names
        assert not any(name.startswith("dm-") for name in names)


@both_sources
def test_a_removal_that_did_not_happen_is_not_reported(source: Source) -> None:
    with loop_medium(1 << 20) as medium, listening(source) as devices:
        name = Path(medium.device).name
        change(name)
        await_event(devices, appearance_of(medium))
        (Path("/sys/class/block") / name / "uevent").write_text("remove")
        change(name)
        run("udevadm", "settle")
        assert Disappeared(name) not in await_event(devices, appearance_of(medium))
        assert Disappeared(name) not in read(devices)


def test_all_that_is_there_is_known_without_udev() -> None:
    with loop_medium(1 << 20) as medium:
        here = sysfs.present_id(Path(medium.device).name)
        assert [volume.identified for volume in sysfs.there() if volume.id == here] == [False]
    assert here not in {volume.id for volume in sysfs.there()}


def test_a_volume_is_found_by_its_device_node() -> None:
    with loop_medium(1 << 20) as medium, listening("udev") as devices:
        volume = devices.volume(medium.device)
        assert volume.id == sysfs.present_id(volume.name)
        assert volume.node == medium.device
        for other in ("/dev/null", "/etc/hostname"):
            with pytest.raises(HotplugError, match="no block device"):
                devices.volume(other)
        with pytest.raises(HotplugError, match="No such file or directory"):
            devices.volume("/dev/nothing")


def test_every_medium_in_a_device_has_an_id_of_its_own() -> None:
    ids = []
    for _ in range(2):
        with loop_medium(1 << 20) as medium:
            name = Path(medium.device).name
            ids.append(sysfs.present_id(name))
    first, second = ids
    assert first is not None
    assert second is not None
    assert first.diskseq < second.diskseq
    assert (first.partition, second.partition) == (0, 0)
    assert sysfs.present_id(name) is None


def test_what_is_no_block_device_has_no_id() -> None:
    assert sysfs.present_id("nothing") is None
    assert sysfs.present_id("../../../etc") is None


def test_this_kernel_numbers_insertions_and_udevd_runs() -> None:
    sysfs.require_diskseq()
    assert udev.default_source() == "udev"
