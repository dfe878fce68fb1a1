"""What a failed attempt has made is said while others hold it, and is not taken for released."""

from __future__ import annotations

import errno

import pytest

from caam_hotplug.errors import DmError, RequestRefusedError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

HELD = "mapping caam-cartridge-01-1-1 is held open: pid 1 (program)"
WHY = "no known filesystem under this key"
POINT = "/run/media/cartridge-01"


def hold(bench: Bench) -> None:
    """Have a program open the mapping between its activation and the probe."""

    def open_it(step: str) -> None:
        if step == "probe":
            bench.kernel.before = lambda _: None
            the_mapping(bench).openers = 1

    bench.kernel.before = open_it


def the_mapping(bench: Bench) -> FakeMapping:
    (mapping,) = bench.kernel.mappings.values()
    return mapping


def in_conflict(bench: Bench) -> Volume:
    """Insert a volume whose mount point is occupied, and whose mapping is held."""
    hold(bench)
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.CONFLICT
    assert bench.reason(volume).startswith(f"{POINT} is not empty; {HELD}")
    return volume


def failed(bench: Bench) -> Volume:
    """Insert a volume without a filesystem, whose mapping is held."""
    hold(bench)
    volume = bench.kernel.insert()
    bench.kernel.media["sda1"].filesystem = None
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.reason(volume).startswith(WHY)
    assert HELD in bench.reason(volume)
    return volume


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_mapping_that_outlives_a_conflict_is_said_and_not_taken_for_released(
    bench: Bench, verb: str
) -> None:
    volume = in_conflict(bench)
    with pytest.raises(RequestRefusedError, match="is in use"):
        bench.answer(verb, volume)
    assert HELD in bench.reason(volume)
    bench.kernel.close_holders()
    bench.settle()
    assert bench.reason(volume) == f"{POINT} is not empty"
    bench.answer(verb, volume)


def test_a_mapping_that_outlives_its_failed_attempt_is_said_until_it_is_closed(
    bench: Bench,
) -> None:
    volume = failed(bench)
    with pytest.raises(RequestRefusedError, match="is in use"):
        bench.answer("lock", volume)
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.reason(volume).startswith(WHY)
    assert "is held open" not in bench.reason(volume)
    bench.answer("lock", volume)


def test_a_conflict_with_something_else_still_says_who_holds_the_mapping(bench: Bench) -> None:
    volume = in_conflict(bench)
    bench.by_hand.cover(POINT)
    bench.wait(2)
    other = f"tmpfs is mounted at {POINT}"
    assert bench.reason(volume).startswith(f"{other}; {HELD}")
    bench.kernel.close_holders()
    bench.settle()
    assert bench.reason(volume) == other
    bench.by_hand.umount(POINT)
    bench.kernel.directories["cartridge-01"] = "others"
    bench.report_mounts()
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_a_mapping_that_a_failed_attempt_has_left_is_served_once_it_can_be(bench: Bench) -> None:
    volume = failed(bench)
    bench.kernel.media["sda1"].filesystem = "ext4"
    bench.answer("retry", volume)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.answer("lock", volume)


def test_what_a_failed_attempt_has_left_is_said_after_a_restart(bench: Bench) -> None:
    volume = failed(bench)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.reason(volume).startswith(WHY)
    assert HELD in bench.reason(volume)
    bench.kernel.close_holders()
    bench.settle()
    assert "is held open" not in bench.reason(volume)


def test_a_medium_that_is_pulled_after_its_failed_attempt_leaves_no_key(bench: Bench) -> None:
    volume = failed(bench)
    bench.pull()
    bench.settle()
    assert the_mapping(bench).key is None
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.GONE


def test_a_failed_volume_whose_mapping_cannot_be_looked_for_is_released_by_a_lock(
    bench: Bench,
) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    failure = DmError("look at mapping", "CAAM-HOTPLUG-1-1", errno.EIO)
    bench.kernel.faults.append(Fault("find_mapping", failure, lasting=True))
    bench.start()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (State.FAILED, str(failure))
    with pytest.raises(RequestRefusedError, match="look at mapping"):
        bench.answer("lock", volume)
    bench.kernel.faults.clear()
    bench.answer("lock", volume)
    assert bench.kernel.mappings == {}


def test_a_mapping_that_an_attempt_has_not_come_to_stays_until_a_lock(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    the_mapping(bench).openers = 1
    failure = DmError("look at mapping", "CAAM-HOTPLUG-1-1", errno.EIO)
    bench.kernel.faults.append(Fault("find_mapping", failure))
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    left = "mapping caam-cartridge-01-1-1 is left, and `lock` releases it"
    assert bench.reason(volume) == f"{failure}; {left}"
    with pytest.raises(RequestRefusedError, match="is in use"):
        bench.answer("lock", volume)
    bench.kernel.close_holders()
    bench.answer("lock", volume)
    assert bench.kernel.mappings == {}


@pytest.mark.parametrize("turns", range(6))
@pytest.mark.parametrize("verb", ["retry", "unlock"])
def test_a_request_at_any_turn_while_a_failed_volume_is_looked_at_makes_an_attempt(
    bench: Bench, verb: str, turns: int
) -> None:
    volume = failed(bench)
    bench.kernel.media["sda1"].filesystem = "ext4"
    bench.wait(2)
    bench.answer_during_look(verb, volume, turns)
    assert bench.state(volume) is State.MOUNTED
