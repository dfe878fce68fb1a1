"""A medium is published as safe to remove only while nothing of its disk can be in use."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings
from caam_hotplug.errors import (
    KernelError,
    MountError,
    RequestRefusedError,
    VolumeBusyError,
    WritesLostError,
)
from caam_hotplug.model import Bus, DeviceNumber, DevType, State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import Fault

LOST = MountError("flush", "/run/media/cartridge-01", errno.EIO)
NEIGHBOUR = "/dev/sda3 is mounted at /mnt"


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    made.start()
    made.settle()
    yield made
    if made.running:
        made.stop()
    made.close()


def plugged(bench: Bench, **facts: object) -> tuple[Volume, Volume]:
    """Insert a disk with two partitions, both mounted."""
    kernel = bench.kernel
    found = []
    for number, (label, name) in enumerate(
        [(None, "sda"), ("cartridge-01", "sda1"), ("cartridge-02", "sda2")]
    ):
        volume = kernel.insert(label, name, **facts)  # type: ignore[arg-type]
        kind = DevType.PARTITION if number else DevType.DISK
        volume = replace(volume, id=VolumeId(1, number), devtype=kind)
        kernel.media[name].volume = volume
        bench.appear(volume)
        found.append(volume)
    bench.settle()
    _, one, two = found
    assert bench.state(one) is bench.state(two) is State.MOUNTED
    return one, two


def is_in_use(bench: Bench) -> bool:
    return bool(bench.kernel.mounts or bench.kernel.mappings or bench.kernel.disk_users)


def pull_all(bench: Bench) -> None:
    for name in [*bench.kernel.media, *bench.kernel.away]:
        bench.pull(name)
    bench.settle()


def test_all_volumes_of_an_ejected_medium_stay_though_the_kernel_has_no_partitions(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    assert bench.answer("eject", one) == "cartridge-01: safe to remove"
    assert bench.state(one) is bench.state(two) is State.EJECTED
    assert set(bench.kernel.media) == {"sda"}
    assert set(bench.kernel.held_disks) == {1}
    pull_all(bench)
    assert bench.state(one) is bench.state(two) is State.GONE
    assert bench.kernel.held_disks == {}
    assert bench.table_sizes()["parked"] == 0


@pytest.mark.parametrize("turn", range(60))
@pytest.mark.parametrize("verb", ["unlock", "retry", "eject"])
def test_a_neighbour_unlocked_at_any_turn_of_an_eject_is_never_on_a_medium_safe_to_remove(
    bench: Bench, verb: str, turn: int
) -> None:
    one, two = plugged(bench)
    bench.answer("lock", two)
    first = bench.ask("eject", one)
    bench.run_turns(turn)
    other = bench.ask(verb, two)
    for _ in range(80):
        bench.run_turns(1)
        states = {bench.state(one), bench.state(two)}
        assert State.EJECTED not in states or not is_in_use(bench)
    bench.settle()
    assert first.done()
    assert other.done()
    first.exception()
    other.exception()


@pytest.mark.parametrize("turn", range(60))
def test_an_eject_at_any_turn_of_a_neighbours_unlock_never_ejects_a_medium_in_use(
    bench: Bench, turn: int
) -> None:
    one, two = plugged(bench)
    bench.answer("lock", two)
    other = bench.ask("unlock", two)
    bench.run_turns(turn)
    first = bench.ask("eject", one)
    for _ in range(80):
        bench.run_turns(1)
        states = {bench.state(one), bench.state(two)}
        assert State.EJECTED not in states or not is_in_use(bench)
    bench.settle()
    assert first.done()
    assert other.done()
    first.exception()
    other.exception()


@pytest.mark.parametrize("turn", range(60))
def test_a_partition_that_is_served_at_any_turn_of_an_eject_is_never_on_a_medium_safe_to_remove(
    bench: Bench, turn: int
) -> None:
    one, _ = plugged(bench)
    third = replace(bench.kernel.insert("cartridge-03", "sda3"), id=VolumeId(1, 3))
    bench.kernel.media["sda3"].volume = third
    asked = bench.ask("eject", one)
    bench.run_turns(turn)
    if "sda3" in bench.kernel.media:
        bench.appear(third)
    for _ in range(80):
        bench.run_turns(1)
        states = {bench.state(volume) for volume in (one, third)}
        assert State.EJECTED not in states or not is_in_use(bench)
    bench.settle()
    assert asked.done()
    assert asked.exception() is None or bench.state(third) is State.MOUNTED


@pytest.mark.parametrize("turn", range(60))
def test_a_medium_pulled_at_any_turn_of_an_eject_leaves_nothing(bench: Bench, turn: int) -> None:
    one, two = plugged(bench)
    asked = bench.ask("eject", one)
    bench.run_turns(turn)
    pull_all(bench)
    assert asked.done()
    assert asked.exception() is None or isinstance(asked.exception(), RequestRefusedError)
    assert bench.state(one) is not State.EJECTED
    assert bench.state(two) is not State.EJECTED
    assert bench.kernel.leftovers() == []
    assert bench.kernel.held_disks == {}


def test_a_medium_whose_other_partition_somebody_has_mounted_is_not_touched(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.kernel.disk_users[1] = [NEIGHBOUR]
    with pytest.raises(VolumeBusyError, match="`lock` releases this volume alone") as refused:
        bench.answer("eject", one)
    assert refused.value.holders == (NEIGHBOUR,)
    assert bench.state(one) is State.MOUNTED
    bench.answer("lock", one)
    assert bench.state(one) is State.LOCKED


def test_a_medium_that_is_used_only_after_its_release_is_locked_and_not_ejected(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    bench.kernel.before = lambda step: (
        bench.kernel.disk_users.update({1: [NEIGHBOUR]}) if step == "empty_disk" else None
    )
    with pytest.raises(VolumeBusyError, match="it is locked, but not safe to remove") as refused:
        bench.answer("eject", one)
    assert refused.value.holders == (NEIGHBOUR,)
    assert bench.state(one) is bench.state(two) is State.LOCKED
    assert set(bench.kernel.media) == {"sda", "sda1", "sda2"}
    bench.kernel.before = lambda _step: None
    bench.kernel.disk_users.clear()
    bench.answer("eject", one)
    assert bench.state(two) is State.EJECTED


def test_a_medium_that_cannot_be_flushed_is_not_safe_to_remove(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.kernel.faults.append(Fault("empty_disk", KernelError("flush", "/dev/sda", 5)))
    with pytest.raises(RequestRefusedError, match=r"not safe to remove: flush .*Input/output"):
        bench.answer("eject", one)
    assert bench.state(one) is State.LOCKED


def test_what_is_built_in_is_not_called_safe_to_remove(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.reload_rules(replace(rule, match=Match(partlabel="cartridge-*")))
    one, _ = plugged(bench, bus=Bus.MMC, removable=False)
    with pytest.raises(RequestRefusedError, match=r"it is built in, .*`lock` releases it"):
        bench.answer("eject", one)
    assert bench.state(one) is State.MOUNTED


def test_an_ejected_volume_is_unlocked_where_the_kernel_has_it_now(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", two)
    bench.answer("unlock", one)
    assert bench.state(one) is State.MOUNTED
    assert bench.entry(one).volume.number == DeviceNumber(259, one.number.minor)
    assert bench.state(two) is State.LOCKED
    assert bench.reason(two) == "another volume of its medium was unlocked"
    bench.answer("unlock", two)
    assert bench.state(two) is State.MOUNTED


def test_an_ejected_volume_whose_disk_others_use_stays_ejected_at_an_unlock(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.answer("eject", one, power_off=False)
    bench.kernel.disk_users[1] = ["program dd"]
    with pytest.raises(VolumeBusyError):
        bench.answer("unlock", one)
    with pytest.raises(VolumeBusyError):
        bench.answer("eject", one)
    assert bench.state(one) is State.LOCKED
    bench.kernel.disk_users.clear()
    bench.answer("unlock", one)
    assert bench.state(one) is State.MOUNTED


def test_a_medium_that_is_not_powered_off_is_given_back_and_locked_once_others_read_it(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one, power_off=False)
    assert bench.kernel.held_disks == {}
    assert bench.state(one) is bench.state(two) is State.EJECTED
    bench.kernel.report = lambda _event: None
    bench.kernel.read_partitions(1)
    bench.announce(bench.kernel.media["sda1"].volume)  # udev hangs
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    assert bench.kernel.mounts == []
    for name in ("sda1", "sda2"):  # and read once more
        bench.report_absent(name)
    for name in ("sda1", "sda2"):
        bench.appear(bench.kernel.media[name].volume)
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    bench.answer("unlock", one)
    assert bench.state(one) is State.MOUNTED


def test_a_partition_that_a_new_table_lacks_ends_its_volume(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one, power_off=False)
    del bench.kernel.away["sda2"]
    bench.kernel.read_partitions(1)
    bench.settle()
    assert bench.state(one) is State.LOCKED
    assert bench.state(two) is State.GONE


def test_a_held_medium_stays_ejected_whatever_is_reported_of_it(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.appear(one)
    bench.report_absent("sda2")
    bench.lose_events()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.EJECTED


def test_a_card_changed_in_its_reader_after_an_eject_is_served(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    kernel = bench.kernel
    kernel.media.clear()
    kernel.away.clear()
    fresh = [kernel.insert(None, "sda"), kernel.insert("cartridge-03", "sda1")]
    for number, name in ((1, "sda1"), (0, "sda")):
        volume = replace(fresh[number], id=VolumeId(9, number))
        kernel.media[name].volume = volume
        bench.appear(volume)
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.GONE
    assert bench.state(replace(one, id=VolumeId(9, 1))) is State.MOUNTED
    assert kernel.held_disks == {}


@pytest.mark.parametrize("end", ["kill", "stop"])
@pytest.mark.parametrize("power_off", [True, False])
def test_after_a_restart_a_medium_is_ejected_once_it_is_held_again(
    bench: Bench, end: str, power_off: bool
) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one, power_off=power_off)
    getattr(bench, end)()
    assert bench.kernel.held_disks == {}
    bench.kernel.faults.append(Fault("empty_disk", hangs_s=1))
    bench.start()
    bench.settle()
    assert bench.state(one) is State.GONE
    bench.wait(2)
    assert bench.state(one) is bench.state(two) is State.EJECTED
    assert bench.entry(one).volume.partlabel == "cartridge-01"
    assert set(bench.kernel.held_disks) == ({1} if power_off else set())
    bench.answer("unlock", two)
    assert bench.state(two) is State.MOUNTED
    assert bench.state(one) is State.LOCKED
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.state(two) is State.MOUNTED
    assert bench.state(one) is State.LOCKED


def test_after_a_restart_a_medium_that_others_use_is_locked(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    bench.kernel.disk_users[1] = ["program dd"]
    bench.start()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    assert "program dd" in bench.reason(one)
    bench.kernel.disk_users.clear()
    bench.answer("unlock", one)
    assert bench.state(one) is State.MOUNTED


def test_a_medium_whose_partitions_were_read_while_no_agent_ran_is_locked(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    bench.kernel.read_partitions(1)
    bench.start()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    assert bench.kernel.mounts == []
    bench.answer("unlock", one)
    bench.kill()
    bench.start()
    bench.settle()
    assert (bench.state(one), bench.state(two)) == (State.MOUNTED, State.LOCKED)


def test_a_medium_pulled_while_no_agent_ran_is_not_published(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    bench.kernel.media.clear()
    bench.kernel.away.clear()
    bench.start()
    bench.settle()
    assert bench.registry.entries() == []


def test_a_volume_to_which_a_write_failed_is_never_safe_to_remove_and_can_be_locked(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    bench.kernel.faults.append(Fault("flush", LOST, about={"cartridge-01"}))
    with pytest.raises(RequestRefusedError, match=r"not all .* the medium: flush .*Input/output"):
        bench.answer("eject", one)
    assert bench.state(one) is State.MOUNTED
    for _ in range(2):
        for volume in (one, two):
            with pytest.raises(WritesLostError, match="`lock` releases it nevertheless"):
                bench.answer("eject", volume)
    bench.answer("lock", one)
    assert bench.state(one) is State.LOCKED
    assert "not all has reached the medium: flush" in bench.reason(one)
    with pytest.raises(WritesLostError, match=r"Input/output error .*1-1\)\)$"):
        bench.answer("eject", one)
    bench.answer("unlock", one)
    with pytest.raises(WritesLostError):
        bench.answer("eject", one)
    assert State.EJECTED not in {state for _, state, _ in bench.states}


def test_a_lock_lets_the_volume_out_of_use_though_a_write_fails(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.kernel.faults.append(Fault("flush", LOST, about={"cartridge-01"}))
    bench.answer("lock", one)
    assert bench.state(one) is State.LOCKED
    assert "Input/output error" in bench.reason(one)
    assert State.FAILED not in {state for _, state, _ in bench.states}


@pytest.mark.parametrize("before", ["lock", "stop"])
def test_a_failed_write_is_remembered_when_the_agent_is_started_again(
    bench: Bench, before: str
) -> None:
    one, two = plugged(bench)
    bench.kernel.faults.append(Fault("flush", LOST, about={"cartridge-01"}))
    if before == "lock":
        bench.answer("lock", one)
        bench.kill()
    else:
        bench.stop()
    bench.start()
    bench.settle()
    for volume in (one, two):
        with pytest.raises(WritesLostError, match="Input/output error"):
            bench.answer("eject", volume)


def test_a_medium_that_is_put_in_again_has_lost_nothing(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.kernel.faults.append(Fault("flush", LOST, about={"cartridge-01"}))
    bench.answer("lock", one)
    pull_all(bench)
    again = bench.insert()
    bench.settle()
    bench.answer("eject", again)
    assert bench.state(again) is State.EJECTED


def test_a_suspended_mapping_is_not_released_and_the_refusal_says_how_to_resume_it(
    bench: Bench,
) -> None:
    one, _ = plugged(bench)
    mapping = bench.kernel.mappings["caam-cartridge-01-1-1"]
    mapping.is_suspended = True
    for verb in ("lock", "eject"):
        with pytest.raises(RequestRefusedError, match="dmsetup resume caam-cartridge-01-1-1"):
            bench.answer(verb, one)
    assert bench.state(one) is State.MOUNTED
    mapping.is_suspended = False
    bench.answer("eject", one)


def test_a_volume_that_is_only_unlocked_is_watched_for_failed_writes_too() -> None:
    (rule,) = BUILT_IN
    bench = Bench((replace(rule, action=Action.UNLOCK),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.UNLOCKED
    bench.kernel.faults.append(Fault("flush", LOST))
    with pytest.raises(RequestRefusedError, match="Input/output error"):
        bench.answer("eject", volume)
    assert bench.state(volume) is State.UNLOCKED
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    bench.stop()
    bench.close()


def test_changed_rules_do_not_release_a_volume_to_which_a_write_failed(bench: Bench) -> None:
    one, _ = plugged(bench)
    (rule,) = BUILT_IN
    bench.kernel.faults.append(Fault("flush", LOST, about={"cartridge-01"}))
    bench.reload_rules(replace(rule, mount=MountSettings(read_only=True)))
    assert bench.state(one) is State.MOUNTED
    assert not bench.entry(one).read_only


def test_a_stop_unmounts_also_what_it_cannot_watch(bench: Bench) -> None:
    one, _ = plugged(bench)
    bench.kill()
    too_many = KernelError("open", "/dev/dm-1", errno.EMFILE)
    bench.kernel.faults.append(Fault("watch_writes", too_many, lasting=True))
    bench.start()
    bench.settle()
    assert bench.state(one) is State.MOUNTED
    bench.stop()
    assert bench.kernel.mounts == []
    assert bench.kernel.mappings == {}
    assert (
        "it is not known whether all was written"
        in {s: r for _, s, r in bench.states}[State.FAILED]
    )


@pytest.mark.parametrize("looked_at", [[], [0], [1], [0, 1]])
@pytest.mark.parametrize("asked", [0, 1])
def test_an_eject_releases_every_volume_of_a_disk_that_is_offline(
    bench: Bench, asked: int, looked_at: list[int]
) -> None:
    volumes = plugged(bench)
    for medium in bench.kernel.media.values():
        medium.is_offline = True
    for mapping in bench.kernel.mappings.values():
        mapping.errors = 1
    for index in looked_at:
        bench.look(volumes[index])
    with pytest.raises(WritesLostError, match="it is not safe to remove"):
        bench.answer("eject", volumes[asked])
    bench.settle()
    assert [bench.state(volume) for volume in volumes] == [State.LOCKED] * 2
    assert not is_in_use(bench)
