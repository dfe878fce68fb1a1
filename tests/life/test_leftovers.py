"""Leftovers, foreign mappings and parked volumes: nothing of them is lost between two phases."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, OnStop
from caam_hotplug.errors import DmError
from caam_hotplug.formats.marks import Mark
from caam_hotplug.model import Appeared, DevType, State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

(RULE,) = BUILT_IN


_requests: list[asyncio.Future[None]] = []
"""Kept, since the loop keeps no strong reference to its tasks."""


@pytest.fixture
def machine() -> Iterator[Bench]:
    """Bench without a check for leftovers."""
    bench = Bench()
    bench.start()
    bench.settle()
    yield bench
    bench.kernel.before = lambda _: None
    bench.stop()
    bench.close()
    _requests.clear()


def at(bench: Bench, step: str, action: Callable[[], object]) -> None:
    """Act once, before the next call of this step."""

    def before(name: str) -> None:
        if name == step:
            bench.kernel.before = lambda _: None
            action()

    bench.kernel.before = before


def take(bench: Bench, volume: Volume) -> None:
    bench._supervisor.take(Appeared(volume), [])


def request(bench: Bench, verb: str, volume: Volume) -> None:
    work = getattr(bench._supervisor, verb)(volume.id, "uid 0")
    _requests.append(asyncio.ensure_future(work))


def mounted_then_killed(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    return volume


def make_foreign(bench: Bench) -> None:
    (mapping,) = bench.kernel.mappings.values()
    mapping.live = mapping.live.replace("0 32768 ", "0 32760 ").replace(" 8:1 0", " 8:1 8")


def two_partitions(bench: Bench) -> tuple[Volume, Volume]:
    disk = bench.kernel.insert(None, "sda", devtype=DevType.DISK)
    one, two = (
        bench.kernel.insert("cartridge-01", "sda1"),
        bench.kernel.insert("cartridge-02", "sda2"),
    )
    for number, volume in enumerate((disk, one, two)):
        object.__setattr__(volume, "id", VolumeId(1, number))
        bench.appear(volume)
    bench.settle()
    return one, two


def remember_ejected(bench: Bench) -> None:
    for name in ("sda1", "sda2"):
        volume = bench.kernel.media[name].volume
        bench.kernel.marks[volume.id] = Mark(volume, State.EJECTED).to_text()


def test_rules_that_change_while_a_leftover_is_adopted_are_followed_at_once(
    machine: Bench,
) -> None:
    volume = mounted_then_killed(machine)
    machine.start()
    ignore = (replace(RULE, action=Action.IGNORE),)
    at(machine, "keep_mapping", lambda: machine._supervisor.reevaluate(ignore))
    machine.settle()
    assert machine.state(volume) is State.IGNORED
    assert machine.kernel.leftovers() == []


def test_a_leftover_of_an_ejected_volume_is_released_before_it_is_safe_to_remove(
    machine: Bench,
) -> None:
    one, two = two_partitions(machine)
    machine.kill()
    remember_ejected(machine)
    machine.start()
    machine.settle()
    machine.answer("unlock", two)
    machine.answer("eject", one)
    assert machine.kernel.leftovers() == []


def test_a_leftover_of_an_ejected_volume_is_released_though_its_rule_keeps_what_is_mounted() -> (
    None
):
    bench = Bench((replace(RULE, on_stop=OnStop.KEEP),))
    bench.start()
    _, two = two_partitions(bench)
    bench.kill()
    remember_ejected(bench)
    bench.start()
    bench.settle()
    bench.answer("unlock", two)
    bench.stop()
    bench.close()
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/cartridge-02"]


def test_a_volume_whose_sibling_was_unlocked_is_not_safe_to_remove_after_a_reread_table(
    machine: Bench,
) -> None:
    one, two = two_partitions(machine)
    machine.answer("eject", two)
    machine.answer("unlock", one)
    assert machine.state(two) is State.LOCKED
    machine.report_absent("sda2")
    machine.appear(two)
    machine.settle()
    assert machine.state(two) is State.LOCKED


def test_a_mapping_that_cannot_be_adopted_is_locked_though_udev_reports_meanwhile(
    machine: Bench,
) -> None:
    volume = mounted_then_killed(machine)
    make_foreign(machine)
    medium = machine.kernel.media["sda1"]
    medium.volume = replace(volume, identified=False, awaits_udev=True)
    machine.unreported_by_udev = {"sda1"}
    machine.start()

    def act() -> None:
        medium.volume = volume
        take(machine, volume)
        request(machine, "lock", volume)

    at(machine, "find_mapping", act)
    machine.settle()
    assert machine.state(volume) is State.LOCKED
    assert machine.kernel.leftovers() == []


@pytest.mark.parametrize("fails", [True, False])
def test_a_parked_volume_whose_release_failed_is_not_mounted_by_other_rules(
    machine: Bench, fails: bool
) -> None:
    volume = mounted_then_killed(machine)
    machine.kernel.marks[volume.id] = Mark(volume, State.LOCKED).to_text()
    machine.kernel.users["cartridge-01"] = 0 if fails else 1
    if fails:
        error = DmError("x", "x", errno.EIO)
        machine.kernel.faults.append(Fault("remove_mapping", error, lasting=True))
    machine.start()
    machine.settle()
    asked = machine.ask("lock", volume)
    machine.settle()
    assert asked.exception() is not None
    assert machine.state(volume) is State.FAILED
    machine.reload_rules(replace(RULE, name="other"))
    assert machine.state(volume) is State.FAILED
    assert machine.kernel.mounts == []


def test_a_reload_during_an_attempt_that_finds_a_foreign_mapping_is_not_lost(
    machine: Bench,
) -> None:
    volume = mounted_then_killed(machine)
    make_foreign(machine)
    machine.start()
    fitting = (replace(RULE, crypt=replace(RULE.crypt, offset=8)),)
    at(machine, "find_mapping", lambda: machine._supervisor.reevaluate(fitting))
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


def test_a_release_for_udevs_report_that_fails_is_tried_again(machine: Bench) -> None:
    volume = machine.kernel.insert()
    machine.announce(volume)
    machine.settle()
    machine.kernel.faults.append(Fault("remove_mapping", DmError("x", "x", errno.EIO)))
    machine.appear(replace(volume, opted_out=True))
    machine.settle()
    assert machine.state(volume) is State.IGNORED
    assert machine.kernel.leftovers() == []


def test_an_attempt_that_fails_while_udevs_report_becomes_overdue_is_tried_again(
    machine: Bench,
) -> None:
    volume = machine.kernel.insert()
    machine.announce(volume)
    machine.kernel.fail_next("create_mapping", errno.ENOMEM)
    overdue = replace(volume, identified=False, awaits_udev=False)
    at(machine, "require_unused", lambda: take(machine, overdue))
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


def test_a_mount_point_that_became_free_is_used_when_udevs_report_is_overdue(
    machine: Bench,
) -> None:
    volume = machine.kernel.insert()
    machine.kernel.directories["cartridge-01"] = "content"
    machine.announce(volume)
    machine.settle()
    assert machine.state(volume) is State.CONFLICT
    machine.kernel.directories.clear()
    machine.appear(replace(volume, identified=False, awaits_udev=False))
    machine.settle()
    assert machine.state(volume) is State.MOUNTED


def test_udevs_facts_of_a_locked_volume_are_published(machine: Bench) -> None:
    volume = machine.kernel.insert()
    machine.announce(volume)
    machine.settle()
    machine.answer("lock", volume)
    machine.appear(replace(volume, path="pci-1"))
    machine.settle()
    assert machine.entry(volume).volume.path == "pci-1"


def test_an_adopted_volume_that_was_locked_holds_nothing_when_the_agent_stops() -> None:
    bench = Bench((replace(RULE, on_stop=OnStop.KEEP),))
    bench.start()
    bench.settle()
    volume = mounted_then_killed(bench)
    bench.start()
    bench.settle()
    bench.answer("lock", volume)
    bench.stop()
    assert bench.state(volume) is State.GONE
    assert bench.kernel.leftovers() == []
    bench.close()


def test_a_leftover_that_others_have_unmounted_leaves_no_directory(machine: Bench) -> None:
    volume = mounted_then_killed(machine)
    make_foreign(machine)
    other = machine.kernel.insert("cartridge-02", "sdb1")
    machine.start()
    machine.settle()
    machine.appear(other)
    machine.settle()
    machine.by_hand.umount("/run/media/cartridge-01")
    machine.answer("lock", volume)
    assert machine.kernel.directories == {"cartridge-02": "ours"}
    assert machine.state(other) is State.MOUNTED


def behind_another(bench: Bench) -> tuple[Volume, Volume, FakeMapping]:
    """Have a volume with a mapping of an earlier run wait for the mount point of another."""
    volume = mounted_then_killed(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.umount("/run/media/cartridge-01")
    bench.kernel.fail_next("find_mapping", errno.EIO)
    bench.start()
    bench.settle()
    other = bench.insert("cartridge-01", "sdb1")
    bench.settle()
    _requests.append(bench.ask("retry", volume))
    bench.settle()
    assert (bench.state(volume), bench.state(other)) == (State.CONFLICT, State.MOUNTED)
    return volume, other, mapping


def test_a_volume_that_waits_behind_another_says_what_is_left_of_it(machine: Bench) -> None:
    volume, other, mapping = behind_another(machine)
    waits = f"/run/media/cartridge-01 belongs to volume {other.id}"
    left = f"mapping {mapping.name} is left, and `lock` releases it"
    assert machine.reason(volume) == f"{waits}; {left}"
    machine.by_hand.remove(mapping)
    machine.settle()
    assert machine.reason(volume) == waits
    machine.answer("lock", other)
    assert machine.state(volume) is State.MOUNTED


def test_a_volume_that_waits_behind_another_is_locked_with_what_is_left(machine: Bench) -> None:
    volume, _, _ = behind_another(machine)
    machine.answer("lock", volume)
    assert machine.state(volume) is State.LOCKED
    assert len(machine.kernel.mappings) == 1


def test_a_volume_that_waits_behind_another_adopts_its_mapping_in_the_end(machine: Bench) -> None:
    volume, other, mapping = behind_another(machine)
    machine.answer("lock", other)
    assert machine.state(volume) is State.MOUNTED
    assert list(machine.kernel.mappings.values()) == [mapping]
