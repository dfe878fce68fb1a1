"""An eject that is interrupted, or done on other premises, claims nothing and loses no volume."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN
from caam_hotplug.errors import MountError, RequestRefusedError, UnknownError, WritesLostError
from caam_hotplug.model import DevType, State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import Fault
from life.test_eject import bench, plugged

__all__ = ["bench"]

NOT_FLUSHED = WritesLostError("not all that was written to it has reached the medium: flush")


def repartition(bench: Bench) -> Volume:
    """Give the disk another table, whose only partition has a number of its own."""
    bench.kernel.away.clear()
    volume = bench.kernel.insert("cartridge-03", "sda3")
    volume = replace(volume, id=VolumeId(1, 3))
    bench.kernel.media["sda3"].volume = volume
    return volume


def test_a_disk_with_other_partitions_than_were_ejected_is_not_safe_after_a_restart(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    three = repartition(bench)
    bench.states.clear()
    for _ in range(2):
        bench.start()
        bench.settle()
        assert State.EJECTED not in {state for _, state, _ in bench.states}
        assert set(bench.kernel.media) == {"sda", "sda3"}
        assert bench.state(three) is State.MOUNTED
        assert bench.state(one) is bench.state(two) is State.GONE
        bench.kill()
    bench.start()
    bench.settle()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_an_agent_that_ends_before_it_publishes_an_emptied_disk_leaves_its_volumes_locked(
    bench: Bench, end: str
) -> None:
    one, two = plugged(bench)
    bench.kernel.faults.append(Fault("empty_disk", hangs_s=1, acts_first=True))
    asked = bench.ask("eject", one)
    bench.settle()
    assert set(bench.kernel.media) == {"sda"}
    if end == "kill":
        bench.kill()
        asked.cancel()
    else:
        bench.begin_stop()
        bench.wait(2)
        bench.cancel()
        assert isinstance(asked.exception(), RequestRefusedError)
        assert set(bench.kernel.media) == {"sda", "sda1", "sda2"}
    assert bench.kernel.held_disks == {}
    bench.start()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    assert set(bench.kernel.media) == {"sda", "sda1", "sda2"}
    bench.answer("unlock", one)
    assert bench.state(one) is State.MOUNTED
    bench.answer("eject", two)
    assert bench.state(one) is bench.state(two) is State.EJECTED


@pytest.mark.parametrize("turn", range(60))
def test_a_stop_at_any_turn_of_an_eject_leaves_no_disk_without_partitions_but_an_ejected_one(
    bench: Bench, turn: int
) -> None:
    one, two = plugged(bench)
    asked = bench.ask("eject", one)
    bench.run_turns(turn)
    bench.stop()
    assert asked.done()
    is_ejected = asked.exception() is None
    assert bench.kernel.held_disks == {}
    assert set(bench.kernel.media) == ({"sda"} if is_ejected else {"sda", "sda1", "sda2"})
    bench.start()
    bench.settle()
    for volume in (one, two):
        assert (bench.state(volume) is State.EJECTED) == is_ejected
        assert bench.state(volume) in {State.EJECTED, State.LOCKED, State.MOUNTED}
    bench.answer("eject", two)
    assert bench.state(one) is bench.state(two) is State.EJECTED


def test_a_disk_whose_cache_was_not_flushed_once_is_never_safe_to_remove(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.kernel.faults.append(Fault("empty_disk", NOT_FLUSHED))
    with pytest.raises(WritesLostError, match="not safe to remove: not all that was written"):
        bench.answer("eject", one)
    assert bench.state(one) is bench.state(two) is State.LOCKED
    for volume in (one, two):
        with pytest.raises(WritesLostError, match=r"not safe to remove: .* \(volume .*-\d\)\)$"):
            bench.answer("eject", volume)
    bench.kill()
    bench.start()
    bench.settle()
    with pytest.raises(WritesLostError, match="not safe to remove"):
        bench.answer("eject", two)
    assert State.EJECTED not in {state for _, state, _ in bench.states}


def test_a_disk_whose_cache_cannot_be_flushed_after_a_restart_is_locked(bench: Bench) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    bench.kernel.faults.append(Fault("empty_disk", NOT_FLUSHED))
    bench.start()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    with pytest.raises(WritesLostError, match="not safe to remove"):
        bench.answer("eject", two)


def test_whether_a_disk_has_partitions_is_asked_and_not_guessed_after_a_restart(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    bench.answer("eject", one)
    bench.kill()
    not_seen = UnknownError("look at", "sda", errno.EMFILE)
    bench.kernel.faults.append(Fault("has_partitions", not_seen))
    bench.states.clear()
    bench.start()
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    bench.answer("eject", two)
    assert bench.state(one) is State.EJECTED


def test_a_disk_that_others_change_after_it_was_given_back_is_not_safe_to_remove_any_more(
    bench: Bench,
) -> None:
    one, two = plugged(bench)
    disk = bench.kernel.media["sda"].volume
    bench.answer("eject", one, power_off=False)
    assert bench.state(one) is State.EJECTED
    bench.kernel.away.clear()  # its table was wiped
    bench.appear(disk)
    bench.settle()
    assert bench.state(one) is bench.state(two) is State.LOCKED
    with pytest.raises(RequestRefusedError):
        bench.answer("unlock", one)
    assert bench.state(one) is bench.state(two) is State.GONE
    assert bench.kernel.held_disks == {}


def test_a_whole_disk_that_others_change_after_it_was_given_back_is_locked(bench: Bench) -> None:
    (rule,) = BUILT_IN
    match = replace(rule.match, devtype=DevType.DISK)
    bench.reload_rules(replace(rule, match=match))
    volume = bench.kernel.insert("cartridge-01", "sda")
    volume = replace(volume, id=VolumeId(1, 0), devtype=DevType.DISK)
    bench.kernel.media["sda"].volume = volume
    bench.appear(volume)
    bench.settle()
    bench.answer("eject", volume, power_off=False)
    assert bench.state(volume) is State.EJECTED
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_locked_volume_says_what_it_lacks_though_its_disk_cannot_be_looked_at(
    bench: Bench,
) -> None:
    bench.kernel.faults.append(Fault("flush", MountError("flush", "it", errno.EIO)))
    one, _ = plugged(bench)
    bench.answer("lock", one)
    lost = "not all has reached the medium"
    assert lost in bench.reason(one)
    bench.kill()
    failure = UnknownError("read", "it", errno.EMFILE)
    bench.kernel.faults[:] = [Fault("has_partitions", failure)]
    bench.start()
    bench.settle()
    assert lost in bench.reason(one)
    assert "its eject was cut short" in bench.reason(one)
