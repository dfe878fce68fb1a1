"""A mount is known by its number and its device, not by the text of its path or source."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import pytest

from caam_hotplug.config.rules import BUILT_IN, OnStop
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench

ROOT: Final = "/run/media"
POINT: Final = f"{ROOT}/cartridge-01"


def mounted(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    return volume


def unhide(bench: Bench) -> None:
    """Undo what covers the mount root."""
    bench.by_hand.umount(ROOT)
    bench.settle()


@pytest.mark.parametrize("verb", ["lock", "eject"])
@pytest.mark.parametrize("is_bound_before", [True, False], ids=["before", "while it is in"])
def test_a_mount_root_that_is_bound_to_itself_keeps_no_volume(
    bench: Bench, verb: str, *, is_bound_before: bool
) -> None:
    if is_bound_before:
        bench.by_hand.cover(ROOT)
    volume = mounted(bench)
    if not is_bound_before:
        bench.by_hand.cover(ROOT)
        bench.settle()
    bench.answer(verb, volume)
    assert [mount.point for mount in bench.kernel.mounts] == [ROOT]
    assert bench.state(volume) in {State.LOCKED, State.EJECTED}
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    bench.answer("lock", volume)
    unhide(bench)


@pytest.mark.parametrize("is_bound_before", [True, False], ids=["before", "while it is in"])
def test_a_pulled_volume_leaves_no_hidden_mount_and_the_next_is_served(
    bench: Bench, *, is_bound_before: bool
) -> None:
    if is_bound_before:
        bench.by_hand.cover(ROOT)
    mounted(bench)
    if not is_bound_before:
        bench.by_hand.cover(ROOT)
        bench.settle()
    bench.pull()
    bench.settle()
    assert [mount.point for mount in bench.kernel.mounts] == [ROOT]
    volume = mounted(bench)
    bench.answer("lock", volume)
    unhide(bench)


def test_an_adopted_mount_is_released_below_a_mount_over_the_root(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kill()
    bench.start()
    bench.settle()
    bench.by_hand.cover(ROOT)
    bench.settle()
    bench.answer("lock", volume)
    assert [mount.point for mount in bench.kernel.mounts] == [ROOT]
    unhide(bench)


def test_a_hidden_mount_of_an_earlier_run_is_in_nobodys_way(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, on_stop=OnStop.KEEP))
    volume = mounted(bench)
    bench.stop()
    bench.by_hand.cover(ROOT)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert len([mount for mount in bench.kernel.mounts if mount.point == POINT]) > 1
    bench.answer("lock", volume)
    unhide(bench)
    assert bench.kernel.mounts == []


def test_a_leftover_whose_mount_is_hidden_costs_no_other_volume_its_mount_of_the_same_name(
    bench: Bench,
) -> None:
    first = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.kill()
    mapping.live = "0 32768 linear 8:99 0"  # so that it is not adopted
    bench.by_hand.cover(ROOT)
    bench.start()
    bench.settle()
    second = bench.insert(name="sdb1")
    bench.settle()
    assert bench.state(second) is State.MOUNTED
    there = [mount.identity for mount in bench.kernel.mounts]
    with pytest.raises(RequestRefusedError, match="something is mounted over it"):
        bench.answer("lock", first)
    assert [mount.identity for mount in bench.kernel.mounts] == there
    assert bench.state(second) is State.MOUNTED
    bench.answer("lock", second)
    unhide(bench)
    bench.answer("lock", first)
    assert bench.kernel.mounts == []


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_users_filesystem_with_our_node_as_its_source_is_no_mount_of_it(
    bench: Bench, verb: str
) -> None:
    volume = mounted(bench)
    node = bench.entry(volume).mapping_node
    bench.by_hand.cover("/home/user/mine", node)
    bench.settle()
    bench.answer(verb, volume)
    assert [mount.source for mount in bench.kernel.mounts] == [node]
    bench.by_hand.umount("/home/user/mine")


def test_a_users_filesystem_with_our_node_as_its_source_occupies_the_mount_point(
    bench: Bench,
) -> None:
    bench.by_hand.cover(POINT, "/dev/dm-1")
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.CONFLICT
    bench.by_hand.umount(POINT)


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_mount_over_the_volumes_is_named_and_left_alone(bench: Bench, verb: str) -> None:
    volume = mounted(bench)
    bench.by_hand.cover(POINT, "others")
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    with pytest.raises(RequestRefusedError, match="others is mounted over it"):
        bench.answer(verb, volume)
    assert len(bench.kernel.mounts) == 2
    bench.by_hand.umount(POINT)
    bench.answer(verb, volume)


def test_what_hides_a_volume_is_said_as_long_as_it_does(bench: Bench) -> None:
    volume = mounted(bench)
    before = bench.reason(volume)
    for point in (POINT, ROOT):
        bench.by_hand.cover(point, "others")
        bench.settle()
        assert bench.state(volume) is State.MOUNTED
        assert bench.reason(volume) == (f"{before}, hidden by others, which is mounted at {point}")
        bench.by_hand.umount(point)
        bench.settle()
        assert bench.reason(volume) == before


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_second_mount_of_the_volume_over_the_first_is_named(bench: Bench, verb: str) -> None:
    volume = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), POINT)
    bench.settle()
    with pytest.raises(RequestRefusedError, match="is mounted over it"):
        bench.answer(verb, volume)
    bench.by_hand.umount(POINT)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.answer(verb, volume)


def test_a_stop_releases_what_is_mounted_twice_at_one_point(bench: Bench) -> None:
    mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), POINT)
    bench.settle()
    bench.stop()
    assert bench.kernel.leftovers() == []
