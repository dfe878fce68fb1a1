"""What is left of a volume that was cut off is said, and so is what its medium lacks."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import Action, OnBusy, Rule
from caam_hotplug.errors import RequestRefusedError, UnknownError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

LOST = "it was mounted read-write; what was written last may be lost"
POINT = "/run/media/cartridge-01"


def mounted(bench: Bench) -> tuple[Volume, FakeMapping]:
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    (mapping,) = bench.kernel.mappings.values()
    return volume, mapping


def replaced(bench: Bench) -> Volume:
    """Mount a volume elsewhere, too, and replace the table of its mapping by hand."""
    volume, mapping = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/mnt")
    bench.by_hand.load(mapping, "0 32768 linear 8:99 0")
    bench.by_hand.resume(mapping)
    bench.settle()
    return volume


def test_a_volume_that_was_cut_off_is_not_locked_while_others_hold_its_mapping(
    bench: Bench,
) -> None:
    volume = replaced(bench)
    assert bench.state(volume) is State.FAILED
    assert "it is mounted at /mnt" in bench.reason(volume)
    assert LOST in bench.reason(volume)
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert LOST in bench.reason(volume)


def test_what_is_left_of_a_volume_that_was_cut_off_is_said_after_a_restart(bench: Bench) -> None:
    volume = replaced(bench)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "it is mounted at /mnt" in bench.reason(volume)
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_a_lock_of_a_volume_whose_key_was_lost_says_who_holds_its_mapping(bench: Bench) -> None:
    volume, _ = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/mnt")
    bench.kernel.new_session()
    bench.wake()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    asked = bench.ask("lock", volume)
    bench.settle()
    assert "it is mounted at /mnt" in str(asked.exception())
    assert bench.state(volume) is State.FAILED
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_what_a_locked_medium_lacks_is_said_after_a_restart(bench: Bench) -> None:
    volume, mapping = mounted(bench)
    bench.by_hand.load(mapping, "0 32768 error")
    bench.by_hand.resume(mapping)
    bench.settle()
    bench.kill()
    bench.start()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.LOCKED, f"before the agent was started; {LOST}",
    )  # fmt: skip


def test_a_medium_that_is_there_is_not_removed_when_its_release_fails(bench: Bench) -> None:
    volume, mapping = mounted(bench)
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.by_hand.load(mapping, "0 32768 error")
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert LOST in bench.reason(volume)
    bench.kernel.faults.clear()
    bench.wait(60)
    assert bench.state(volume) is State.LOCKED
    assert LOST in bench.reason(volume)


def test_a_volume_without_a_rule_is_not_ignored_while_others_hold_its_mapping(
    bench: Bench,
) -> None:
    volume, mapping = mounted(bench)
    bench.kill()
    mapping.openers = 1
    bench.rules = (Rule(name="none", action=Action.UNLOCK, match=Match(partlabel="other")),)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "is held open" in bench.reason(volume)
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.IGNORED


def test_a_conflict_names_the_volume_that_has_the_mount_point_now(bench: Bench) -> None:
    first = bench.insert("cartridge-01", "sda1")
    second = bench.insert("cartridge-01", "sdb1")
    third = bench.insert("cartridge-01", "sdc1")
    bench.settle()
    assert bench.reason(third) == f"{POINT} belongs to volume {first.id}"
    bench.pull("sda1")
    bench.settle()
    assert bench.reason(third) == f"{POINT} belongs to volume {second.id}"


def test_an_orphan_loses_its_key_also_while_mounts_cannot_be_seen(bench: Bench) -> None:
    _, mapping = mounted(bench)
    bench.kill()
    bench.kernel.pull()
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.start()
    bench.settle()
    assert (mapping.live, mapping.key) == ("0 32768 error", None)
    bench.kernel.faults.clear()
    bench.kill()
    bench.start()
    bench.settle()


def test_an_orphan_whose_release_wants_for_descriptors_is_tried_again(bench: Bench) -> None:
    mounted(bench)
    bench.kill()
    bench.kernel.pull()
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.start()
    bench.settle()
    bench.wait(100)
    assert len(bench.kernel.mappings) == 1
    bench.kernel.faults.clear()
    bench.wait(40)
    assert bench.kernel.leftovers() == []


def test_a_stop_does_not_wait_for_the_next_attempt_to_release_an_orphan(bench: Bench) -> None:
    mounted(bench)
    bench.kill()
    bench.kernel.pull()
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.start()
    bench.wait(40)
    bench.begin_stop()
    assert bench._supervisor is not None
    assert bench.run(bench._supervisor.ended(0)) == []
    bench.cancel()
    bench.kernel.faults.clear()
    bench.start()
    bench.settle()


@pytest.mark.parametrize("turns", range(12))
def test_a_volume_pulled_right_after_it_was_cut_off_leaves_nothing(
    bench: Bench, turns: int
) -> None:
    volume = replaced(bench)
    bench.by_hand.umount("/mnt")
    bench.run_turns(turns)
    bench.pull()
    bench.settle()
    assert bench.state(volume) in {State.GONE, State.REMOVED_UNSAFELY}


def not_released(bench: Bench) -> tuple[Volume, FakeMapping]:
    """Have a lock fail that has not come to the mapping, since the mounts cannot be read."""
    volume, mapping = mounted(bench)
    bench.kill()
    mapping.live = "0 32768 error"
    (rule,) = bench.rules
    bench.rules = (replace(rule, on_busy=OnBusy.DETACH),)
    bench.start()
    bench.settle()
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    with pytest.raises(RequestRefusedError, match="could not release it"):
        bench.answer("lock", volume)
    bench.kernel.faults.clear()
    return volume, mapping


def test_a_release_that_fails_names_the_mapping_that_is_left(bench: Bench) -> None:
    volume, mapping = not_released(bench)
    assert bench.state(volume) is State.FAILED
    assert f"mapping {mapping.name} is left, and `lock` releases it" in bench.reason(volume)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED


def test_a_mapping_whose_removal_nobody_has_asked_for_is_not_said_to_go(bench: Bench) -> None:
    volume, mapping = not_released(bench)
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "it goes when they close it" not in bench.reason(volume)
    assert f"mapping {mapping.name} is left, and `lock` releases it" in bench.reason(volume)


def test_a_mapping_that_is_left_and_goes_is_not_said_to_be_left(bench: Bench) -> None:
    volume, mapping = not_released(bench)
    bench.by_hand.umount(POINT)
    bench.by_hand.remove(mapping)
    bench.settle()
    assert bench.state(volume) is State.LOCKED


@pytest.mark.parametrize("is_served", [False, True])
def test_a_mapping_that_a_failed_release_leaves_and_somebody_removes_is_not_said_to_be_left(
    bench: Bench, is_served: bool
) -> None:
    bench.kernel.fail_next("remove_mapping", errno.EIO)
    if is_served:
        volume, _ = mounted(bench)
        bench.reload_rules()
    else:
        bench.kernel.fail_next("probe", errno.EIO)
        volume = bench.insert()
    bench.settle()
    assert "is left" in bench.reason(volume)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.remove(mapping)
    bench.settle()
    assert "is left" not in bench.look(volume).reason


def test_a_mapping_that_is_held_is_named_though_its_holders_are_not_known(bench: Bench) -> None:
    volume, mapping = mounted(bench)
    failure = UnknownError("read", "holders", errno.EMFILE)
    bench.kernel.faults.append(Fault("holders", failure, lasting=True))
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert f"mapping {mapping.name} is held open: by whom is not known" in bench.reason(volume)
    bench.kernel.faults.clear()
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.LOCKED


@pytest.mark.parametrize("turns", range(24))
def test_a_request_is_answered_though_the_release_that_it_comes_upon_is_tried_again(
    bench: Bench, turns: int
) -> None:
    volume, _ = mounted(bench)
    bench.kernel.new_session()
    failure = UnknownError("read", "mounts", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
    bench.wake()
    bench.run_turns(turns)
    asked = bench.ask("lock", volume)
    bench.settle()
    assert isinstance(asked.exception(), RequestRefusedError)
    bench.kernel.faults.clear()
    bench.wait(60)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
