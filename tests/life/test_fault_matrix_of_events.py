"""Every system call with which a device is checked fails, at each event that the device can have.

The real `Devices` read a tree of files that is built as sysfs is, and hand their events to the real
supervisor over a kernel in memory. The system calls of an event are not written down: they are
recorded from an undisturbed run.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import pyudev

from caam_hotplug.kernel import device_users, sysfs_tree, udev, uevents
from caam_hotplug.kernel.linux import LinuxKernel
from caam_hotplug.model import Event, EventsLost, State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeProcess

NOT_KNOWN: Final = (
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.EACCES, errno.EINTR,
)  # fmt: skip
CALLS: Final = ("open", "read", "readlink", "stat", "listdir")
HARMS: Final = {"load_error_table", "unmount", "detach", "remove_mapping", "remove_mount_point"}
TARGET, NEIGHBOUR = "sdb", "sdc"


class Calls:
    """The module `os` as sysfs is read through it; one call fails, or all from that one on."""

    def __init__(self) -> None:
        self.made = 0
        self.fails_at: int | None = None
        self.number = 0
        self.is_lasting = False

    def __getattr__(self, name: str) -> Any:
        return self._counted(getattr(os, name)) if name in CALLS else getattr(os, name)

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **named: Any) -> Any:
            at, self.made = self.made, self.made + 1
            if self.fails_at is not None and (
                at == self.fails_at or (self.is_lasting and at > self.fails_at)
            ):
                raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **named)

        return counted


class Socket:
    """A socket with these uevents."""

    def __init__(self) -> None:
        self.waiting: list[uevents.Uevent | None] = []

    def read(self, _most: int) -> list[uevents.Uevent | None]:
        waiting, self.waiting = self.waiting, []
        return waiting

    def close(self) -> None: ...


class Machine:
    """Two sticks, udev, sysfs, and an agent."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.calls = Calls()
        self._sys = folder / "sys"
        self._block = self._sys / "class/block"
        self._block.mkdir(parents=True)
        self._root = os.open(self._sys, os.O_PATH | os.O_DIRECTORY)
        self._labels: dict[str, str] = {}
        patch.setattr(sysfs_tree, "root", lambda: self._root)
        patch.setattr(sysfs_tree, "os", self.calls)
        patch.setattr(FakeProcess, "is_present", lambda _, v: LinuxKernel.is_present(_real(), v))
        patch.setattr(pyudev.Devices, "from_name", self._from_udev)
        patch.setattr(device_users, "is_locked", lambda _name: False)
        self.devices = udev.Devices("udev")
        self.devices.close()
        self.kernels, self.udevs = Socket(), Socket()
        patch.setattr(self.devices, "_kernel", self.kernels)
        patch.setattr(self.devices, "_udev", self.udevs)
        patch.setattr(self.devices, "_may_announce", lambda: True)
        self.bench = Bench()
        self.bench.start()
        self.bench.settle()

    def close(self) -> None:
        """End the agent."""
        self.bench.cancel()
        self.bench.close()
        os.close(self._root)

    def plug(self, disk: str) -> Volume:
        """Put another medium in the socket; report nothing yet."""
        label = f"stick-{disk}"
        volume = self.bench.kernel.insert(label, f"{disk}1", key=label.encode().ljust(36))
        usb = self._sys / f"devices/usb-{disk}"
        folder = usb / "block" / disk
        partition = folder / f"{disk}1"
        partition.mkdir(parents=True)
        (folder / "device").mkdir()
        (self._sys / "bus/usb").mkdir(parents=True, exist_ok=True)
        (usb / "subsystem").symlink_to(self._sys / "bus/usb")
        _write(usb, serial=label)
        _write(folder, dev="8:0", size="40960", ro="0", removable="1", diskseq=volume.id.diskseq)
        _write(folder / "device", vendor="Acme", model="Stick")
        _write(partition, dev=volume.number, size="32768", ro="0", partition="1")
        for name, at in ((disk, folder), (f"{disk}1", partition)):
            (self._block / name).symlink_to(os.path.relpath(at, self._block))
        self._labels[f"{disk}1"] = label
        return volume

    def pull(self, disk: str) -> None:
        """Take the medium out; report nothing yet."""
        self.bench.kernel.pull(f"{disk}1")
        for name in (f"{disk}1", disk):
            (self._block / name).unlink()
        shutil.rmtree(self._sys / f"devices/usb-{disk}")
        del self._labels[f"{disk}1"]

    def report(self, action: str, disk: str) -> None:
        """Have kernel and udev report the partition."""
        name = f"{disk}1"
        said = {} if action == "remove" else self._said(name)
        self.kernels.waiting.append(uevents.Uevent(action, name, {"PARTNAME": f"stick-{disk}"}))
        self.take(self.devices.read_kernel)
        self.udevs.waiting.append(uevents.Uevent(action, name, said))
        self.take(self.devices.read_udev)

    def lose_events(self) -> None:
        """Have the kernel drop events."""
        self.take(lambda: [EventsLost()])

    def take(self, read: Callable[[], list[Event]]) -> None:
        """Hand events to the agent as it does itself, and let it act."""

        async def take() -> None:
            supervisor = self.bench._supervisor
            assert supervisor is not None
            for event in read():
                supervisor.take(event, self.devices.present())

        self.bench.run(take())
        self.bench.settle()

    def end_fault(self) -> None:
        """Let all calls succeed from now on, until nothing is unknown."""
        self.calls.fails_at = None
        for _ in range(3):
            for question in self.devices._unknown._questions.values():
                question.at = 0.0
            self.take(self.devices.overdue)
        assert not self.devices._unknown.times()

    def harms_to(self, disk: str) -> set[str]:
        """Return the steps that took something from the medium in the socket."""
        kernel = self.bench.kernel
        noted = zip(kernel.steps, kernel.subjects, strict=True)
        return {step for step, subject in noted if f"stick-{disk}" in subject} & HARMS

    def present(self) -> list[Volume]:
        """Return the volumes that are in the sockets."""
        return [medium.volume for medium in self.bench.kernel.media.values()]

    def is_mounted(self, volume: Volume) -> bool:
        """Whether it is published as mounted."""
        return self.bench.state(volume) is State.MOUNTED

    def is_served(self, volume: Volume) -> bool:
        """Whether it is mounted, and published so."""
        points = [mount.point for mount in self.bench.kernel.mounts]
        is_there = points.count(f"/run/media/{volume.partlabel}") == 1
        return is_there and self.is_mounted(volume)

    def _said(self, name: str) -> dict[str, str]:
        return {"ID_PART_ENTRY_NAME": self._labels[name]} if name in self._labels else {}

    def _from_udev(self, _context: object, _subsystem: str, name: str) -> Any:
        if not (self._block / name).exists():
            raise pyudev.DeviceNotFoundByNameError("block", name)
        return _Device(self._said(name))


@dataclass
class _Device:
    """A device as pyudev gives it."""

    properties: dict[str, str]
    is_initialized: bool = True


def _write(folder: Path, **attributes: object) -> None:
    for name, value in attributes.items():
        (folder / name).write_text(f"{value}\n")


def _real() -> LinuxKernel:
    return LinuxKernel(Path("/nonexistent"), Path("/nonexistent"))


# moments


@dataclass(frozen=True, eq=False)
class Moment:
    """Events of the target, which is mounted before unless `is_new`."""

    name: str
    act: Callable[[Machine], None]
    is_new: bool = False
    is_there: bool = True
    """Whether a medium is in the target's socket afterwards."""
    is_the_same: bool = True


def change(machine: Machine) -> None:
    machine.report("change", TARGET)


def false_removal(machine: Machine) -> None:
    machine.report("remove", TARGET)


def loss(machine: Machine) -> None:
    machine.lose_events()


def arrival(machine: Machine) -> None:
    machine.plug(TARGET)
    machine.report("add", TARGET)


def arrival_in_a_loss(machine: Machine) -> None:
    machine.plug(TARGET)
    machine.lose_events()


def removal(machine: Machine) -> None:
    machine.pull(TARGET)
    machine.report("remove", TARGET)


def removal_in_a_loss(machine: Machine) -> None:
    machine.pull(TARGET)
    machine.lose_events()


def swap(machine: Machine) -> None:
    machine.pull(TARGET)
    machine.plug(TARGET)
    machine.report("remove", TARGET)
    machine.report("add", TARGET)


def swap_in_a_loss(machine: Machine) -> None:
    machine.pull(TARGET)
    machine.plug(TARGET)
    machine.lose_events()


MOMENTS: Final = (
    Moment("change", change),
    Moment("false removal", false_removal),
    Moment("loss of events", loss),
    Moment("arrival", arrival, is_new=True),
    Moment("arrival in a loss of events", arrival_in_a_loss, is_new=True),
    Moment("removal", removal, is_there=False, is_the_same=False),
    Moment("removal in a loss of events", removal_in_a_loss, is_there=False, is_the_same=False),
    Moment("swap", swap, is_the_same=False),
    Moment("swap in a loss of events", swap_in_a_loss, is_the_same=False),
)


@contextmanager
def machine_at(moment: Moment, folder: Path) -> Iterator[tuple[Machine, Volume | None, Volume]]:
    """Make a machine before the moment, with its neighbour and the target mounted."""
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(folder, patch)
        neighbour = machine.plug(NEIGHBOUR)
        machine.report("add", NEIGHBOUR)
        target = None
        if not moment.is_new:
            target = machine.plug(TARGET)
            machine.report("add", TARGET)
            assert machine.is_served(target)
        assert machine.is_served(neighbour)
        machine.bench.kernel.steps.clear()
        machine.bench.kernel.subjects.clear()
        machine.calls.made = 0
        try:
            yield machine, target, neighbour
        finally:
            machine.close()


@pytest.mark.parametrize("is_lasting", [False, True], ids=["once", "lasting"])
@pytest.mark.parametrize("moment", MOMENTS, ids=lambda moment: moment.name)
def test_a_call_that_fails_takes_no_present_medium_and_hides_no_change_for_good(
    moment: Moment, is_lasting: bool, tmp_path: Path
) -> None:
    with machine_at(moment, tmp_path / "undisturbed") as (machine, _, _):
        moment.act(machine)
        made = machine.calls.made
    assert made
    for at in range(made):
        number = NOT_KNOWN[(at + 3 * is_lasting) % len(NOT_KNOWN)]
        with machine_at(moment, tmp_path / f"{at}") as (machine, target, neighbour):
            machine.calls.fails_at, machine.calls.number = at, number
            machine.calls.is_lasting = is_lasting
            try:
                moment.act(machine)
                stays = [neighbour] + ([target] if target and moment.is_the_same else [])
                assert all(map(machine.is_served, stays))
                assert machine.harms_to(NEIGHBOUR) == set()
                assert machine.harms_to(TARGET) == set() or not moment.is_the_same
                machine.end_fault()
                there = machine.present()
                assert all(map(machine.is_served, there))
                assert len(machine.bench.kernel.mounts) == len(there) == 1 + moment.is_there
                assert not target or target in there or not machine.is_mounted(target)
            except BaseException as error:
                error.add_note(f"{errno.errorcode[number]} of call {at}")
                raise
