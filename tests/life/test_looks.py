"""What no event reports is seen when somebody looks, and before a volume is released."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action
from caam_hotplug.errors import RequestRefusedError, UnknownError, WritesLostError
from caam_hotplug.model import Mount, State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

POINT: Final = "/run/media/cartridge-01"
LOOK: Final = ["find_mapping", "mounts", "look", "is_offline"]
BY_ERROR: Final = "its filesystem has become read-only by an error"
OFFLINE: Final = "the kernel has taken its disk offline"


def mounted(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.steps.clear()
    return volume


def mapping_of(bench: Bench, volume: Volume) -> FakeMapping:
    (found,) = [m for m in bench.kernel.mappings.values() if m.uuid.endswith(str(volume.id))]
    return found


def take_offline(bench: Bench, *, offline: bool = True) -> None:
    bench.kernel.media["sda1"].is_offline = offline


def _mount_of(mapping: FakeMapping) -> Mount:
    return Mount(mapping.number, "/mnt", f"/dev/dm-{mapping.number.minor}", False, "ext4")


# looks


def test_a_check_has_a_time_and_changes_nothing(bench: Bench) -> None:
    volume = mounted(bench)
    before = bench.entry(volume)
    states = len(bench.states)
    after = bench.look(volume)
    assert after == before
    assert after.observed_at > before.observed_at
    assert bench.kernel.steps == LOOK
    assert len(bench.states) == states


def test_many_reads_cause_one_look_a_second(bench: Bench) -> None:
    volume = mounted(bench)
    for _ in range(9):
        bench.look(volume)
    assert bench.kernel.steps == LOOK
    bench.wait(1)
    bench.look(volume)
    assert bench.kernel.steps == LOOK * 2


def test_nothing_looks_by_itself(bench: Bench) -> None:
    mounted(bench)
    bench.wait(3600)
    assert bench.kernel.steps == []


def test_what_holds_nothing_is_as_published_at_each_read(bench: Bench) -> None:
    volume = mounted(bench)
    bench.answer("lock", volume)
    before = bench.entry(volume).observed_at
    bench.kernel.steps.clear()
    assert bench.look(volume).observed_at > before
    assert bench.kernel.steps == []


@pytest.mark.parametrize("step", LOOK)
def test_a_check_that_fails_changes_nothing_and_is_as_old_as_the_one_before(
    bench: Bench, step: str
) -> None:
    volume = mounted(bench)
    before = bench.entry(volume)
    failure = UnknownError("look at", "it", errno.EMFILE)
    bench.kernel.faults.append(Fault(step, failure, lasting=True))
    assert bench.look(volume) == before
    assert bench.entry(volume).observed_at == before.observed_at
    bench.kernel.faults.clear()
    bench.wait(2)
    assert bench.look(volume).observed_at > before.observed_at


def test_the_users_of_what_is_left_are_searched_again_only_if_they_are_others(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 2
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    bench.kernel.steps.clear()
    assert bench.look(volume).state is State.FAILED
    assert "holders" not in bench.kernel.steps
    mapping_of(bench, volume).holders = 1
    bench.wait(1)
    assert "pid 2" not in bench.look(volume).reason
    assert "holders" in bench.kernel.steps


# suspended


def test_a_suspended_mapping_is_said_when_it_is_looked_at_and_nothing_is_torn_down(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    mapping = mapping_of(bench, volume)
    bench.by_hand.suspend(mapping)
    bench.settle()
    assert "suspended" not in bench.reason(volume)
    seen = bench.look(volume)
    assert seen.state is State.MOUNTED
    assert f"mapping {mapping.name} is suspended" in seen.reason
    assert f"dmsetup resume {mapping.name}` ends that" in seen.reason
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.reason(volume) == f"at {POINT}, read-write"


# errors of a filesystem


def test_a_filesystem_that_became_read_only_by_an_error_is_said_when_it_is_looked_at(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.by_hand.fail(POINT)
    bench.look(volume)
    bench.wait(1)
    seen = bench.entry(volume)
    assert (seen.state, seen.read_only) == (State.MOUNTED, True)
    assert BY_ERROR in seen.reason


@pytest.mark.parametrize("looks", [False, True])
def test_a_filesystem_that_stopped_at_an_error_is_not_safe_to_remove(
    bench: Bench, *, looks: bool
) -> None:
    volume = mounted(bench)
    bench.by_hand.fail(POINT)
    if looks:
        bench.look(volume)
        bench.wait(1)
    task = bench.ask("eject", volume)
    bench.wait(1)
    with pytest.raises(WritesLostError, match=BY_ERROR):
        bench.run(bench._answer_of(task))
    assert bench.state(volume) is State.MOUNTED
    task = bench.ask("lock", volume)
    bench.wait(1)
    bench.run(bench._answer_of(task))
    assert bench.state(volume) is State.LOCKED
    assert BY_ERROR in bench.reason(volume)


@pytest.mark.parametrize("looks", [False, True])
def test_a_filesystem_that_stopped_at_an_error_is_removed_unsafely(
    bench: Bench, *, looks: bool
) -> None:
    volume = mounted(bench)
    bench.by_hand.fail(POINT)
    if looks:
        bench.look(volume)
        bench.wait(1)
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_remount_that_is_half_done_when_it_is_looked_at_is_no_error(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.fail(POINT)
    bench.look(volume)
    bench.by_hand.remount(POINT, read_only=True)
    bench.wait(1)
    assert bench.reason(volume) == f"at {POINT}, read-only"
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE


def test_an_ext4_that_has_counted_errors_is_read_only_whatever_mountinfo_says(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    mapping_of(bench, volume).errors = 1
    seen = bench.look(volume)
    assert (seen.state, seen.read_only) == (State.MOUNTED, True)
    assert "the filesystem has counted errors" in seen.reason
    with pytest.raises(WritesLostError):
        bench.answer("eject", volume)
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_filesystem_that_became_writable_elsewhere_is_removed_unsafely(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.remount(POINT, read_only=True)
    bench.settle()
    mount = bench.by_hand.mount_at(POINT)
    bench.kernel.mounts[:] = [replace(mount, is_filesystem_read_only=False)]
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


@pytest.mark.parametrize("verb", ["retry", "unlock"])
def test_a_request_for_what_is_mounted_is_answered_by_what_the_kernel_has(
    bench: Bench, verb: str
) -> None:
    volume = mounted(bench)
    report, bench.kernel.mounts_changed = bench.kernel.mounts_changed, lambda: None
    bench.by_hand.umount(POINT)
    bench.kernel.mounts_changed = report
    if verb == "unlock":
        with pytest.raises(RequestRefusedError, match="it is mounted already"):
            bench.answer(verb, volume)
        bench.look(volume)
        assert bench.state(volume) is State.LOCKED
    bench.answer(verb, volume)
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1


# a disk that is taken offline


def test_a_disk_that_is_offline_is_said_when_it_is_looked_at_and_stays(bench: Bench) -> None:
    volume = mounted(bench)
    take_offline(bench)
    seen = bench.look(volume)
    assert seen.state is State.MOUNTED
    assert OFFLINE in seen.reason
    bench.wait(3600)
    assert bench.kernel.mounts
    take_offline(bench, offline=False)
    assert bench.look(volume).reason == f"at {POINT}, read-write"
    bench.answer("eject", volume)


@pytest.mark.parametrize("held", [False, True])
def test_a_lock_releases_a_disk_that_is_offline_and_waits_for_no_flush(
    bench: Bench, *, held: bool
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = int(held)
    take_offline(bench)
    bench.answer("lock", volume)
    if held:
        assert bench.state(volume) is State.FAILED
        assert "it goes when they close it" in bench.reason(volume)
        bench.kernel.close_holders()
        bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert OFFLINE in bench.reason(volume)
    assert "what was written last may be lost" in bench.reason(volume)
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.mounts == []


@pytest.mark.parametrize("looks", [False, True])
def test_a_disk_that_is_offline_is_never_safe_to_remove(bench: Bench, *, looks: bool) -> None:
    volume = mounted(bench)
    mapping_of(bench, volume).errors = 1
    take_offline(bench)
    if looks:
        bench.look(volume)
    for _ in range(3):
        with pytest.raises(RequestRefusedError):
            bench.answer("eject", volume)
        assert bench.state(volume) is State.LOCKED
    assert not any("safe to remove" in why for _, s, why in bench.states if s is State.EJECTED)


def test_a_disk_that_was_locked_before_it_went_offline_is_not_safe_to_remove(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.answer("lock", volume)
    take_offline(bench)
    with pytest.raises(RequestRefusedError):
        bench.answer("eject", volume)
    take_offline(bench, offline=False)
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED


def test_a_disk_that_came_back_can_be_unlocked_and_says_what_was_lost(bench: Bench) -> None:
    volume = mounted(bench)
    take_offline(bench)
    bench.answer("lock", volume)
    with pytest.raises(RequestRefusedError):
        bench.answer("unlock", volume)
    take_offline(bench, offline=False)
    bench.answer("unlock", volume)
    assert "what was written last may be lost" in bench.reason(volume)
    with pytest.raises(WritesLostError):
        bench.answer("eject", volume)


def test_a_stop_releases_a_disk_that_is_offline_and_the_next_run_serves_it(bench: Bench) -> None:
    volume = mounted(bench)
    take_offline(bench)
    bench.begin_stop()
    assert bench.kernel.leftovers() == []
    assert "flush" not in bench.kernel.steps
    take_offline(bench, offline=False)
    bench.cancel()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert "what was written last may be lost" in bench.reason(volume)


def test_a_disk_that_is_offline_and_pulled_is_removed_unsafely(bench: Bench) -> None:
    volume = mounted(bench)
    take_offline(bench)
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


# unlocked without a mount


@pytest.fixture
def checked(bench: Bench) -> Volume:
    """Volume that was unlocked without a mount."""
    volume = mounted(bench)
    bench.answer("lock", volume)
    bench.answer("unlock", volume, mounts=False)
    assert bench.state(volume) is State.UNLOCKED
    return volume


def test_a_volume_is_unlocked_without_a_mount_and_locked_again(
    bench: Bench, checked: Volume
) -> None:
    assert bench.kernel.mounts == []
    assert "not mounted, since that was asked for" in bench.reason(checked)
    assert bench.entry(checked).mapping_node
    bench.answer("lock", checked)
    assert bench.state(checked) is State.LOCKED
    assert bench.kernel.leftovers() == []
    bench.answer("unlock", checked)
    assert bench.state(checked) is State.MOUNTED


def test_a_volume_without_a_mount_stays_so_whatever_is_reported(
    bench: Bench, checked: Volume
) -> None:
    bench.appear(replace(checked, serial="another"))
    bench.reload_rules(*BUILT_IN)
    bench.report_mounts()
    bench.answer("retry", checked)
    assert bench.state(checked) is State.UNLOCKED
    assert bench.kernel.mounts == []


@pytest.mark.parametrize("end", ["kill", "stop", "hand_over"])
def test_the_next_run_does_not_mount_it_either(bench: Bench, checked: Volume, end: str) -> None:
    getattr(bench, end)()
    bench.start()
    bench.settle()
    assert bench.state(checked) is State.UNLOCKED
    assert bench.kernel.mounts == []
    bench.answer("lock", checked)
    bench.answer("unlock", checked)
    assert bench.state(checked) is State.MOUNTED


def test_a_program_that_checks_it_keeps_it_from_being_locked(bench: Bench, checked: Volume) -> None:
    mapping_of(bench, checked).holders = 1
    with pytest.raises(RequestRefusedError, match="is in use"):
        bench.answer("lock", checked)
    assert bench.state(checked) is State.UNLOCKED
    assert bench.units.started == []
    mapping_of(bench, checked).holders = 0
    bench.answer("lock", checked)


def test_a_mount_by_the_person_who_has_unlocked_it_is_observed(
    bench: Bench, checked: Volume
) -> None:
    bench.by_hand.mount(_mount_of(mapping_of(bench, checked)), "/mnt")
    bench.settle()
    seen = bench.entry(checked)
    assert (seen.state, seen.mount_point, seen.filesystem) == (State.UNLOCKED, "/mnt", "ext4")
    assert "mounted at /mnt by somebody else" in seen.reason
    with pytest.raises(RequestRefusedError, match="it is mounted at /mnt"):
        bench.answer("lock", checked)
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.entry(checked).mount_point == ""
    bench.answer("lock", checked)


def test_a_volume_that_the_person_has_mounted_is_removed_unsafely(
    bench: Bench, checked: Volume
) -> None:
    bench.by_hand.mount(_mount_of(mapping_of(bench, checked)), "/mnt")
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(checked) is State.REMOVED_UNSAFELY
    bench.by_hand.umount("/mnt")


def test_a_volume_that_the_person_has_unmounted_is_removed_safely(
    bench: Bench, checked: Volume
) -> None:
    bench.by_hand.mount(_mount_of(mapping_of(bench, checked)), "/mnt")
    bench.by_hand.umount("/mnt")
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(checked) is State.GONE


def test_a_mounted_volume_is_not_unlocked_without_a_mount(bench: Bench) -> None:
    volume = mounted(bench)
    with pytest.raises(RequestRefusedError, match="it is mounted already"):
        bench.answer("unlock", volume, mounts=False)
    assert bench.state(volume) is State.MOUNTED


def test_a_rule_that_only_unlocks_observes_the_mounts_of_others() -> None:
    bench = Bench((replace(BUILT_IN[0], action=Action.UNLOCK),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    assert "asked for" not in bench.reason(volume)
    bench.by_hand.mount(_mount_of(mapping_of(bench, volume)), "/mnt")
    bench.settle()
    assert bench.entry(volume).mount_point == "/mnt"
    bench.by_hand.umount("/mnt")
    bench.settle()
    bench.stop()
    assert bench.kernel.leftovers() == []
    bench.close()
