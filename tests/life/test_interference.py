"""What others do to a volume's mount and mapping is published, and nothing is lost by it."""

from __future__ import annotations

import errno
import logging
from dataclasses import replace
from typing import Final

import pytest

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnBusy, Rule
from caam_hotplug.config.templates import UnitTemplate
from caam_hotplug.errors import (
    DmError,
    MappingBusyError,
    RequestRefusedError,
    UnknownError,
    WritesLostError,
)
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

POINT: Final = "/run/media/cartridge-01"
LOST: Final = "it was mounted read-write; what was written last may be lost"
OTHER_TABLE: Final = "somebody else has changed the table of its mapping"


def mounted(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    volume = bench.insert(label, name)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.steps.clear()
    return volume


def mapping_of(bench: Bench, volume: Volume) -> FakeMapping:
    (found,) = [m for m in bench.kernel.mappings.values() if m.uuid.endswith(str(volume.id))]
    return found


# unmounted


def test_a_volume_that_somebody_has_unmounted_is_locked_and_says_so(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.LOCKED, "unmounted by somebody else",
    )  # fmt: skip
    assert bench.kernel.leftovers() == []
    assert bench.entry(volume).mount_point == bench.entry(volume).mapping_name == ""


def test_a_volume_that_somebody_has_unmounted_can_be_unlocked_again(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.settle()
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED


def test_a_volume_that_somebody_has_unmounted_and_pulled_was_removed_safely(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE


def test_a_volume_that_somebody_has_detached_names_who_holds_it_until_they_close_it(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.reason(volume) == (
        "unmounted by somebody else; mapping caam-cartridge-01-1-1 is held open: "
        "pid 1 (program) has a file open; it goes when they close it"
    )
    assert "load_error_table" not in bench.kernel.steps
    assert mapping_of(bench, volume).key is not None
    bench.kernel.close_holders()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.LOCKED, "unmounted by somebody else",
    )  # fmt: skip


def test_the_users_of_a_detached_filesystem_are_searched_by_the_number_of_its_files(
    bench: Bench,
) -> None:
    mounted(bench)
    number = bench.by_hand.mount_at(POINT).number
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    assert bench.kernel.searched == [number]
    bench.kernel.close_holders()
    bench.settle()


@pytest.mark.parametrize("turns", range(20))
def test_holders_that_close_it_at_any_time_of_its_release_leave_it_locked(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.run_turns(turns)
    bench.kernel.close_holders()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.LOCKED, "unmounted by somebody else",
    )  # fmt: skip
    assert bench.kernel.leftovers() == []


def test_a_filesystem_that_is_still_being_written_after_its_unmount_is_being_released(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.shows_holders = False
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    assert bench.state(volume) is State.DETACHING
    assert bench.reason(volume).startswith("unmounted by somebody else; mapping")
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_a_change_of_a_mapping_that_is_held_has_it_looked_at_once(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    bench.kernel.steps.clear()
    bench.by_hand.rename(mapping_of(bench, volume), "mine")
    bench.run_turns(60)
    assert bench.kernel.steps.count("find_mapping") == 1
    assert "mapping mine is held open" in bench.reason(volume)
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_a_detached_volume_that_is_held_can_be_unlocked_before_its_holders_close_it(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_detached_volume_that_is_held_is_not_mounted_again_by_a_report_of_its_device(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    bench.appear(replace(volume, serial="another"))
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.kernel.mounts == []


def test_a_detached_volume_that_is_held_and_pulled_loses_its_key(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    mapping = mapping_of(bench, volume)
    bench.pull()
    bench.settle()
    assert mapping.key is None
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_detached_volume_that_was_closed_before_it_was_pulled_was_removed_safely(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    bench.kernel.close_holders()
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE


@pytest.mark.parametrize("turns", range(20))
def test_a_volume_that_is_pulled_right_after_an_unmount_was_removed_safely(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.run_turns(turns + 1)
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE


@pytest.mark.parametrize("turns", range(24))
def test_a_volume_that_is_pulled_right_after_a_detach_in_use_was_removed_unsafely(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.by_hand.umount(POINT, lazily=True)
    bench.run_turns(turns)
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


@pytest.mark.parametrize("users", [0, 1])
def test_a_pull_while_the_unit_of_an_unmount_by_others_runs_is_judged_by_who_still_writes(
    bench: Bench, users: int
) -> None:
    bench.settle()
    bench.reload_rules(replace(BUILT_IN[0], on_unmount=UnitTemplate("end@{partlabel}.service")))
    bench.units.duration_s = 5
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = users
    bench.by_hand.umount(POINT, lazily=True)
    bench.settle()
    assert bench.state(volume) is State.DETACHING
    bench.pull()
    bench.settle()
    assert bench.state(volume) is (State.REMOVED_UNSAFELY if users else State.GONE)


def test_a_bind_of_a_volume_keeps_its_mapping_when_the_mount_itself_is_unmounted(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/mnt")
    bench.by_hand.umount(POINT)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "it is mounted at /mnt" in bench.reason(volume)
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_a_lost_write_is_said_of_a_volume_that_somebody_has_unmounted(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.fail_next("flush", errno.EIO)
    bench.by_hand.umount(POINT)
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert "not all has reached the medium" in bench.reason(volume)
    with pytest.raises(WritesLostError):
        bench.answer("eject", volume)


def test_a_volume_that_somebody_mounts_anew_at_once_is_served_as_before(bench: Bench) -> None:
    volume = mounted(bench)
    mount = bench.by_hand.mount_at(POINT)
    bench.by_hand.umount(POINT)
    bench.by_hand.mount(mount, POINT)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.answer("lock", volume)
    assert bench.kernel.leftovers() == []


def test_own_unmounts_are_nobody_elses(bench: Bench) -> None:
    volume = mounted(bench)
    bench.answer("lock", volume)
    bench.answer("unlock", volume)
    bench.answer("eject", volume)
    assert not any("somebody else" in reason for _, _, reason in bench.states)


def test_only_the_volume_that_differs_acts(
    bench: Bench,
) -> None:
    first, second = mounted(bench), mounted(bench, "cartridge-02", "sdb1")
    bench.by_hand.umount(POINT)
    bench.settle()
    assert bench.kernel.steps[0] == "mounts"
    assert (bench.state(first), bench.state(second)) == (State.LOCKED, State.MOUNTED)
    about = zip(bench.kernel.steps, bench.kernel.subjects, strict=False)
    assert not [step for step, subject in about if "cartridge-02" in subject]


def test_mounts_of_others_concern_no_volume(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/mnt")
    bench.settle()
    assert bench.kernel.steps == ["mounts"]
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.kernel.steps == ["mounts"] * 2
    assert bench.state(volume) is State.MOUNTED


def test_mounts_that_cannot_be_read_change_nothing_and_are_read_again(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.fail_next("mounts", UnknownError("read", "mountinfo", errno.EMFILE))
    bench.by_hand.umount(POINT)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.wait(1)
    assert bench.state(volume) is State.LOCKED


@pytest.mark.parametrize("after", [0, 1])
def test_mounts_that_cannot_be_read_for_long_change_nothing_until_they_can(
    bench: Bench, after: int
) -> None:
    volume = mounted(bench)
    failure = UnknownError("read", "mountinfo", errno.EMFILE)
    bench.kernel.faults.append(Fault("mounts", failure, after=after, lasting=True))
    bench.by_hand.umount(POINT)
    bench.wait(5)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.faults.clear()
    bench.wait(2)
    assert bench.state(volume) is State.LOCKED


def test_mounts_that_cannot_be_read_are_said_once_and_asked_for_more_and_more_rarely(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    volume = mounted(bench)
    failure = UnknownError("read", "mountinfo", errno.EMFILE)
    caplog.set_level(logging.INFO)
    for _ in range(2):
        caplog.clear()
        bench.kernel.steps.clear()
        bench.kernel.faults.append(Fault("mounts", failure, lasting=True))
        for _ in range(4):  # which are no reason for longer pauses
            bench.by_hand.remount(POINT, read_only=True)
            bench.settle()
        bench.wait(63)
        assert bench.kernel.steps.count("mounts") == 4 + len([1, 3, 7, 15, 31, 61])
        assert len([r for r in caplog.records if "mountinfo" in r.getMessage()]) == 1
        bench.kernel.faults.clear()
        bench.wait(30)
        assert bench.entry(volume).read_only
        assert [r.levelname for r in caplog.records if "mounts" in r.getMessage()][-1] == "INFO"
        bench.by_hand.remount(POINT, read_only=False)
        bench.settle()


@pytest.mark.parametrize("turns", range(12))
def test_a_lock_at_any_time_around_an_unmount_by_somebody_else_is_granted(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.run_turns(turns)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("turns", range(12))
def test_an_unlock_at_any_time_after_an_unmount_by_somebody_else_mounts_it(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    bench.by_hand.umount(POINT)
    bench.run_turns(turns + 2)  # else it is mounted already, as far as is published
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1


@pytest.mark.parametrize("turns", range(12))
def test_an_unmount_by_somebody_else_at_any_time_of_a_lock_leaves_nothing(
    bench: Bench, turns: int
) -> None:
    volume = mounted(bench)
    task = bench.ask("lock", volume)
    bench.run_turns(turns)
    if bench.kernel.mounts:
        bench.by_hand.umount(POINT)
    bench.settle()
    bench.run(bench._answer_of(task))
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("turns", range(12))
@pytest.mark.parametrize("end", ["pull", "stop"])
def test_an_unmount_by_somebody_else_and_a_pull_or_stop_leave_nothing(
    bench: Bench, turns: int, end: str
) -> None:
    mounted(bench)
    bench.by_hand.umount(POINT)
    bench.run_turns(turns)
    bench.pull() if end == "pull" else bench.stop()
    bench.settle()
    assert bench.kernel.leftovers() == []


# remounted


@pytest.mark.parametrize("filesystem", [False, True])
def test_a_remount_by_somebody_else_is_published_at_once(bench: Bench, *, filesystem: bool) -> None:
    volume = mounted(bench)
    bench.by_hand.remount(POINT, read_only=True, filesystem=filesystem)
    bench.settle()
    assert bench.entry(volume).read_only
    assert (bench.state(volume), bench.reason(volume)) == (State.MOUNTED, f"at {POINT}, read-only")
    bench.by_hand.remount(POINT, read_only=False, filesystem=filesystem)
    bench.settle()
    assert not bench.entry(volume).read_only
    assert bench.reason(volume) == f"at {POINT}, read-write"


@pytest.mark.parametrize(
    ("filesystem", "state"), [(True, State.GONE), (False, State.REMOVED_UNSAFELY)]
)
def test_only_a_filesystem_that_nobody_can_write_to_is_removed_safely(
    bench: Bench, state: State, *, filesystem: bool
) -> None:
    volume = mounted(bench)
    bench.by_hand.remount(POINT, read_only=True, filesystem=filesystem)
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(volume) is state


def test_a_filesystem_that_has_become_read_only_by_an_error_is_removed_unsafely(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.fail_next("flush", errno.EIO)
    bench.by_hand.remount(POINT, read_only=True)
    bench.settle()
    assert bench.reason(volume).startswith(f"at {POINT}, read-only; not all has reached the medium")
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_what_could_not_be_written_is_said_while_it_stays_mounted(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.fail_next("flush", errno.EIO)
    with pytest.raises(WritesLostError):
        bench.answer("eject", volume)
    assert bench.reason(volume).startswith(f"at {POINT}, read-write; not all has reached")


def test_what_could_not_be_written_is_said_though_it_stays_mounted_for_its_users(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.fail_next("flush", errno.EIO)
    with pytest.raises(RequestRefusedError, match="is in use"):
        bench.answer("lock", volume)
    assert bench.reason(volume).startswith(f"at {POINT}, read-write; not all has reached")


def test_a_volume_of_a_read_only_rule_that_was_made_writable_is_removed_unsafely(
    bench: Bench,
) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, mount=MountSettings(read_only=True)))
    volume = mounted(bench)
    bench.by_hand.remount(POINT, read_only=False)
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_volume_that_somebody_has_moved_is_published_where_it_is(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.move(POINT, "/mnt")
    bench.settle()
    assert (bench.state(volume), bench.entry(volume).mount_point) == (State.MOUNTED, "/mnt")
    with pytest.raises(RequestRefusedError, match="it is mounted at /mnt"):
        bench.answer("eject", volume)
    bench.by_hand.umount("/mnt")
    bench.settle()
    assert bench.state(volume) is State.LOCKED


# mappings


def test_a_mapping_that_somebody_has_removed_is_released(bench: Bench) -> None:
    bench.settle()
    bench.reload_rules(Rule(name="raw", action=Action.UNLOCK, match=Match(partlabel="*")))
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.UNLOCKED
    mapping = mapping_of(bench, volume)
    with pytest.raises(MappingBusyError):  # the agent watches for failed writes
        bench.by_hand.remove(mapping)
    mapping.watches = 0
    bench.by_hand.remove(mapping)
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.LOCKED, "its mapping was removed by somebody else",
    )  # fmt: skip
    mapping.watches = 1
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.UNLOCKED


def test_a_mapping_that_somebody_has_removed_by_force_is_locked_and_says_the_loss(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    with pytest.raises(MappingBusyError):
        bench.by_hand.remove(mapping_of(bench, volume), force=True)
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert bench.reason(volume).startswith(OTHER_TABLE)
    assert bench.reason(volume).endswith(LOST)
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


FOREIGN: Final = "0 32768 linear 8:99 0"


def replace_table(bench: Bench, volume: Volume) -> None:
    mapping = mapping_of(bench, volume)
    bench.by_hand.load(mapping, FOREIGN)
    bench.by_hand.resume(mapping)


def test_nothing_is_flushed_through_a_table_of_somebody_else(bench: Bench) -> None:
    volume = mounted(bench)
    replace_table(bench, volume)
    bench.settle()
    steps = bench.kernel.steps
    assert steps.index("load_error_table") < steps.index("unmount")
    assert "flush" not in steps
    assert bench.state(volume) is State.LOCKED
    assert bench.reason(volume).endswith(LOST)
    with pytest.raises(WritesLostError, match="what was written last may be lost"):
        bench.answer("eject", volume)
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_table_of_somebody_else_costs_a_read_only_volume_nothing(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, mount=MountSettings(read_only=True)))
    volume = mounted(bench)
    replace_table(bench, volume)
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert LOST not in bench.reason(volume)
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED


def test_a_volume_in_use_keeps_no_foreign_table_while_its_users_finish(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    replace_table(bench, volume)
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    assert mapping.live == "0 32768 error"
    assert bench.kernel.mounts == []
    assert not any("an earlier run" in reason for _, _, reason in bench.states)


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_table_that_nobody_has_reported_is_found_before_a_flush(bench: Bench, verb: str) -> None:
    volume = mounted(bench)
    mapping_of(bench, volume).live = FOREIGN
    with pytest.raises(RequestRefusedError, match=OTHER_TABLE):
        bench.answer(verb, volume)
    assert "flush" not in bench.kernel.steps
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.leftovers() == []


def test_a_table_that_nobody_has_reported_is_found_before_the_flush_of_a_stop(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    mapping_of(bench, volume).live = FOREIGN
    bench.stop()
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


def test_lost_events_have_every_mapping_looked_at(bench: Bench) -> None:
    volume = mounted(bench)
    mapping_of(bench, volume).live = FOREIGN
    bench.lose_events()
    bench.settle()
    assert bench.state(volume) is State.LOCKED


def test_a_mapping_that_cannot_be_looked_at_changes_nothing_and_is_looked_at_again(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.faults.append(Fault("find_mapping", DmError("look", "x", errno.EAGAIN)))
    replace_table(bench, volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert "load_error_table" not in bench.kernel.steps
    bench.wait(1)
    assert bench.state(volume) is State.LOCKED


def test_another_name_of_the_mapping_is_published(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.rename(mapping_of(bench, volume), "mine")
    bench.settle()
    assert (bench.state(volume), bench.entry(volume).mapping_name) == (State.MOUNTED, "mine")
    bench.answer("lock", volume)
    assert bench.kernel.leftovers() == []


# suspended


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_suspended_volume_is_neither_locked_nor_ejected_and_names_the_cure(
    bench: Bench, verb: str
) -> None:
    volume = mounted(bench)
    mapping = mapping_of(bench, volume)
    bench.by_hand.suspend(mapping)
    with pytest.raises(RequestRefusedError, match=f"dmsetup resume {mapping.name}` ends that"):
        bench.answer(verb, volume)
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1
    bench.by_hand.resume(mapping)
    bench.answer(verb, volume)


@pytest.mark.parametrize("table", [None, FOREIGN])
def test_the_cure_of_a_suspended_volume_makes_no_table_of_somebody_else_live(
    bench: Bench, table: str | None
) -> None:
    volume = mounted(bench)
    mapping = mapping_of(bench, volume)
    bench.by_hand.suspend(mapping)
    if table is not None:
        bench.by_hand.load(mapping, table)
    with pytest.raises(RequestRefusedError) as refused:
        bench.answer("lock", volume)
    cure = str(refused.value).split("`")[1]
    for command in cure.split(" && "):
        dmsetup, verb, name = command.split(" ")
        assert dmsetup == "dmsetup"
        getattr(bench.by_hand, verb)(bench.kernel.mappings[name])
    bench.settle()
    bench.answer("lock", volume)
    assert (bench.state(volume), "may be lost" in bench.reason(volume)) == (State.LOCKED, False)
    assert "load_error_table" not in bench.kernel.steps


def test_a_stop_resumes_a_suspended_volume_before_it_flushes(bench: Bench) -> None:
    volume = mounted(bench)
    mapping = mapping_of(bench, volume)
    bench.by_hand.suspend(mapping)
    bench.by_hand.load(mapping, FOREIGN)
    bench.stop()
    steps = bench.kernel.steps
    assert steps.index("resume_mapping") < steps.index("flush")
    assert mapping.live != FOREIGN
    assert bench.kernel.leftovers() == []


def test_a_suspended_volume_that_is_pulled_is_released(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.suspend(mapping_of(bench, volume))
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert bench.kernel.leftovers() == []


def test_a_volume_whose_users_may_finish_is_locked_once_they_have(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, on_busy=OnBusy.DETACH))
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    with pytest.raises(RequestRefusedError, match="is held open"):
        bench.answer("lock", volume)
    assert bench.state(volume) is State.FAILED
    bench.kernel.close_holders()
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    assert "lock asked for by" in bench.reason(volume)
