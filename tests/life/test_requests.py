"""Volumes are locked, ejected, unlocked and retried on request, and served by changed rules."""

from __future__ import annotations

import errno
import signal
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnBusy, Rule
from caam_hotplug.config.templates import UnitTemplate
from caam_hotplug.errors import (
    DmError,
    FlushError,
    MountError,
    RequestRefusedError,
    VolumeBusyError,
)
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import Fault

POINT = "/run/media/cartridge-01"
(RULE,) = BUILT_IN


def served(bench: Bench, **facts: object) -> Volume:
    volume = bench.insert(**facts)  # type: ignore[arg-type]
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    return volume


def check_mounted(bench: Bench, volume: Volume) -> None:
    """Check that the volume is mounted as before."""
    assert bench.state(volume) is State.MOUNTED
    assert [mount.point for mount in bench.kernel.mounts] == [POINT]
    assert bench.entry(volume).mount_point == POINT


def test_the_mapping_and_mount_of_a_volume_are_published_while_they_exist(bench: Bench) -> None:
    volume = served(bench)
    entry = bench.entry(volume)
    assert (entry.rule, entry.blob) == ("built-in", "/data/caam/cartridge-01.bb")
    assert (entry.mount_point, entry.filesystem, entry.read_only) == (POINT, "ext4", False)
    assert entry.mapping_node.startswith("/dev/dm-")
    assert entry.mapping_name == "caam-cartridge-01-1-1"
    assert set(entry.steps) >= {"import the blob", "load the table", "mount"}
    bench.answer("lock", volume)
    entry = bench.entry(volume)
    assert (entry.mount_point, entry.mapping_node, entry.filesystem) == ("", "", "")
    assert entry.rule == "built-in"


def test_a_locked_volume_holds_nothing_and_stays_so_until_it_is_unlocked(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    assert "uid 0" in bench.reason(volume)
    assert bench.kernel.leftovers() == []
    assert bench.kernel.steps.index("flush") < bench.kernel.steps.index("unmount")
    bench.appear(volume)
    bench.appear(replace(volume, vendor="Another"))
    bench.settle()
    assert bench.state(volume) is State.LOCKED
    bench.answer("unlock", volume)
    check_mounted(bench, volume)


def test_an_ejected_medium_is_powered_off_and_stays_ejected(bench: Bench) -> None:
    volume = served(bench)
    assert bench.answer("eject", volume) == "cartridge-01: safe to remove"
    assert (bench.state(volume), bench.reason(volume)) == (State.EJECTED, "safe to remove")
    assert bench.kernel.leftovers() == []
    assert bench.kernel.powered_off == ["sda1"]
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.EJECTED
    bench.answer("unlock", volume)
    check_mounted(bench, volume)


def test_an_ejected_medium_that_comes_back_is_served(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("eject", volume, power_off=False)
    assert bench.kernel.powered_off == []
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE
    served(bench)


def test_an_ejected_medium_was_not_removed_unsafely(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("eject", volume)
    bench.pull()
    bench.settle()
    assert State.REMOVED_UNSAFELY not in [state for _, state, _ in bench.states]


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_request_does_not_release_a_volume_in_use_and_names_its_users(
    bench: Bench, verb: str
) -> None:
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 2
    with pytest.raises(VolumeBusyError) as refused:
        bench.answer(verb, volume)
    assert refused.value.holders == (
        "pid 1 (program) has a file open",
        "pid 2 (program) has a file open",
    )
    check_mounted(bench, volume)
    bench.kernel.users.clear()
    bench.answer(verb, volume)
    assert bench.kernel.leftovers() == []


def test_a_volume_of_which_it_is_not_known_whether_all_is_written_is_not_released(
    bench: Bench,
) -> None:
    volume = served(bench)
    bench.kernel.faults.append(Fault("flush", FlushError("flush", POINT, errno.EMFILE)))
    with pytest.raises(RequestRefusedError, match=r"lock .*flush .*Too many open files"):
        bench.answer("lock", volume)
    check_mounted(bench, volume)
    bench.answer("lock", volume)
    assert bench.reason(volume) == "lock asked for by uid 0"


@pytest.mark.parametrize(
    ("ends", "signals"),
    [({signal.SIGTERM}, 1), ({signal.SIGKILL}, 2), (set(), 2)],
    ids=["at-the-first", "at-the-second", "never"],
)
def test_users_are_ended_if_the_rule_says_so(ends: set[int], signals: int) -> None:
    bench = Bench((replace(RULE, on_busy=OnBusy.SIGNAL),))
    bench.start()
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.fatal_signals = ends
    if ends:
        bench.answer("lock", volume)
        assert bench.state(volume) is State.LOCKED
    else:
        with pytest.raises(VolumeBusyError, match=r"pid 1"):
            bench.answer("lock", volume)
        check_mounted(bench, volume)
    assert bench.kernel.steps.count("end_holders") == signals
    bench.stop()
    bench.close()


def test_a_detached_volume_is_not_published_as_released_while_it_is_in_use() -> None:
    bench = Bench((replace(RULE, on_busy=OnBusy.DETACH),))
    bench.start()
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    with pytest.raises(RequestRefusedError, match=r"is held open: pid 1 .program. has a file open"):
        bench.answer("eject", volume)
    assert bench.state(volume) is State.FAILED
    assert bench.kernel.mounts == []
    assert bench.kernel.powered_off == []
    bench.kernel.close_holders()
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


def test_a_mapping_that_cannot_be_removed_is_a_failure_and_can_be_released_later(
    bench: Bench,
) -> None:
    volume = served(bench)
    error = DmError("remove mapping", "caam-cartridge-01-1-1", errno.EBUSY)
    bench.kernel.faults.append(Fault("remove_mapping", error, lasting=True))
    with pytest.raises(RequestRefusedError, match=r"Device or resource busy"):
        bench.answer("lock", volume)
    assert bench.state(volume) is State.FAILED
    bench.kernel.faults.clear()
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.leftovers() == []


def test_a_request_does_not_release_a_volume_that_is_only_unlocked_and_in_use() -> None:
    bench = Bench((replace(RULE, action=Action.UNLOCK),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    mapping.holders = 1
    with pytest.raises(VolumeBusyError):
        bench.answer("lock", volume)
    assert bench.state(volume) is State.UNLOCKED
    mapping.holders = 0
    bench.answer("lock", volume)
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


def test_all_volumes_of_a_medium_are_ejected_together(bench: Bench) -> None:
    first = served(bench)
    second = bench.kernel.insert("cartridge-02", "sda2")
    bench.kernel.diskseq -= 1
    beside = replace(second, id=replace(first.id, partition=2))
    bench.kernel.media["sda2"].volume = beside
    bench.kernel.blobs["cartridge-02.bb"] = bench.kernel.blobs["cartridge-01.bb"]
    bench.appear(beside)
    bench.settle()
    assert bench.state(beside) is State.MOUNTED
    bench.kernel.users["cartridge-02"] = 1
    with pytest.raises(VolumeBusyError, match=r"cartridge-02"):
        bench.answer("eject", first)
    assert bench.kernel.powered_off == []
    bench.kernel.users.clear()
    bench.answer("eject", first)
    assert (bench.state(first), bench.state(beside)) == (State.EJECTED, State.EJECTED)
    assert bench.kernel.powered_off == ["sda1"]


def test_a_failed_volume_is_tried_again_on_request(bench: Bench) -> None:
    bench.kernel.faults.append(Fault("probe", MountError("probe", "x", errno.EIO), lasting=True))
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    with pytest.raises(RequestRefusedError, match=r"retry .*failed: .*Input/output error"):
        bench.answer("retry", volume)
    bench.kernel.faults.clear()
    bench.answer("retry", volume)
    check_mounted(bench, volume)


def test_a_volume_in_conflict_names_the_owner_of_its_mount_point_and_keeps_waiting(
    bench: Bench,
) -> None:
    served(bench)
    second = bench.insert(name="sdb1")
    bench.settle()
    with pytest.raises(RequestRefusedError, match=r"conflict: .* belongs to volume 1-1"):
        bench.answer("retry", second)
    bench.pull()
    bench.settle()
    check_mounted(bench, second)


def test_a_volume_in_conflict_can_be_ejected(bench: Bench) -> None:
    first = served(bench)
    second = bench.insert(name="sdb1")
    bench.settle()
    bench.answer("eject", second)
    assert bench.state(second) is State.EJECTED
    check_mounted(bench, first)


@pytest.mark.parametrize(
    ("before", "verb", "words"),
    [
        ((), "unlock", "it is mounted already"),
        (("lock",), "retry", "it is locked, since that was asked for; unlock it"),
        (("eject",), "retry", "it is ejected, since that was asked for; unlock it"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused_and_changes_nothing(
    bench: Bench, before: tuple[str, ...], verb: str, words: str
) -> None:
    volume = served(bench)
    for earlier in before:
        bench.answer(earlier, volume)
    state = bench.state(volume)
    with pytest.raises(RequestRefusedError, match=words):
        bench.answer(verb, volume)
    assert bench.state(volume) is state


def test_a_retry_of_a_volume_that_has_been_mounted_meanwhile_is_granted(bench: Bench) -> None:
    bench.settle()
    bench.kernel.fail_next("require_unused", errno.EBUSY)
    volume = bench.kernel.insert()
    bench.announce(volume)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    bench.appear(volume)  # a retry without a request
    bench.settle()
    bench.kernel.steps.clear()
    bench.answer("retry", volume)
    check_mounted(bench, volume)
    assert set(bench.kernel.steps) <= {"find_mapping", "mounts", "look", "is_offline"}


@pytest.mark.parametrize("verb", ["lock", "eject", "unlock", "retry"])
def test_a_volume_that_no_rule_matches_is_not_touched_whatever_is_requested(
    bench: Bench, verb: str
) -> None:
    volume = bench.insert("../../etc")
    bench.settle()
    with pytest.raises(RequestRefusedError, match=r"no rule matches it"):
        bench.answer(verb, volume)
    assert set(bench.kernel.steps) <= {"our_mappings", "our_mount_points"}


def test_a_request_for_a_volume_that_is_gone_is_refused(bench: Bench) -> None:
    volume = served(bench)
    bench.pull()
    bench.settle()
    with pytest.raises(RequestRefusedError, match=r"volume 1-1 is not there any more"):
        bench.answer("lock", volume)


def test_a_second_request_is_answered_at_once(bench: Bench) -> None:
    volume = served(bench)
    first = bench.ask("lock", volume)
    bench.run_turns(2)
    with pytest.raises(RequestRefusedError, match=r"lock was asked for before"):
        bench.answer("eject", volume)
    bench.settle()
    assert first.result() is None


def test_locking_or_ejecting_a_locked_volume_is_done_at_once(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("lock", volume)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    bench.answer("eject", volume)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.EJECTED


@pytest.mark.parametrize("verb", ["lock", "eject"])
@pytest.mark.parametrize("after", range(40))
def test_a_medium_pulled_at_any_turn_of_a_request_leaves_nothing_and_the_request_is_answered(
    bench: Bench, verb: str, after: int
) -> None:
    volume = served(bench)
    asked = bench.ask(verb, volume)
    bench.run_turns(after)
    bench.pull()
    bench.settle()
    assert asked.done()
    if asked.exception() is not None:
        assert isinstance(asked.exception(), RequestRefusedError)
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("after", range(40))
def test_a_request_at_every_turn_of_an_arrival_is_granted(bench: Bench, after: int) -> None:
    bench.settle()
    volume = bench.insert()
    bench.run_turns(after)
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("after", range(40))
def test_a_stop_at_every_turn_of_a_request_leaves_nothing(bench: Bench, after: int) -> None:
    volume = served(bench)
    asked = bench.ask("lock", volume)
    bench.run_turns(after)
    bench.stop()
    bench.settle()
    assert asked.done()
    if asked.exception() is not None:
        assert isinstance(asked.exception(), RequestRefusedError)
    assert bench.kernel.leftovers() == []


def test_a_request_for_a_stuck_volume_is_refused_without_delay(bench: Bench) -> None:
    bench.kernel.faults.append(Fault("probe", hangs_s=60.0))
    volume = bench.insert()
    bench.wait(10)
    assert bench.state(volume) is State.STUCK
    with pytest.raises(RequestRefusedError, match=r"the kernel does not answer"):
        bench.answer("lock", volume)
    bench.wait(60)
    check_mounted(bench, volume)


def test_a_volume_that_waits_is_served_when_its_blob_appears(bench: Bench) -> None:
    volume = bench.insert()
    bench.kernel.blobs.clear()
    bench.settle()
    assert bench.state(volume) is State.WAITING
    bench.add_blob("cartridge-02.bb")
    assert bench.state(volume) is State.WAITING
    assert bench.kernel.steps.count("read_blob") == 1
    bench.add_blob("cartridge-01.bb")
    check_mounted(bench, volume)


def test_changed_rules_apply_to_media_that_are_present(bench: Bench) -> None:
    volume = served(bench)
    bench.reload_rules()
    assert (bench.state(volume), bench.reason(volume)) == (State.IGNORED, "there are no rules")
    assert bench.kernel.leftovers() == []
    bench.reload_rules(replace(RULE, mount=MountSettings(read_only=True)))
    assert bench.kernel.mounts[0].read_only
    assert bench.state(volume) is State.MOUNTED


def test_rules_with_the_same_target_do_not_touch_a_mounted_volume(bench: Bench) -> None:
    volume = served(bench)
    steps = len(bench.kernel.steps)
    bench.reload_rules(replace(RULE, name="cartridges", on_busy=OnBusy.DETACH))
    check_mounted(bench, volume)
    assert bench.entry(volume).rule == "cartridges"
    assert bench.kernel.steps[steps:] == []


def test_changed_rules_do_not_touch_a_volume_in_use_until_it_is_free(bench: Bench) -> None:
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.reload_rules(replace(RULE, mount=MountSettings(read_only=True)))
    check_mounted(bench, volume)
    assert not bench.kernel.mounts[0].read_only


def test_a_locked_volume_stays_locked_under_changed_rules(bench: Bench) -> None:
    volume = served(bench)
    bench.answer("lock", volume)
    bench.reload_rules(replace(RULE, name="others"))
    assert bench.state(volume) is State.LOCKED


def test_a_volume_in_conflict_is_reevaluated_under_changed_rules(bench: Bench) -> None:
    served(bench)
    second = bench.insert(name="sdb1")
    bench.settle()
    bench.reload_rules()
    assert bench.state(second) is State.IGNORED


UNITS = Rule(
    name="with units",
    match=RULE.match,
    on_mount=UnitTemplate("ingest@{partlabel}.service"),
    on_unmount=UnitTemplate("ingest-end@{partlabel}.service"),
    unit_within_s=10.0,
)
BEGIN, END = "ingest@cartridge\\x2d01.service", "ingest-end@cartridge\\x2d01.service"


@pytest.fixture
def with_units(bench: Bench) -> Bench:
    """Bench with a rule that starts units."""
    bench.settle()
    bench.reload_rules(UNITS)
    return bench


def test_units_are_started_while_the_volume_is_mounted(with_units: Bench) -> None:
    bench = with_units
    volume = served(bench)
    bench.answer("lock", volume)
    assert bench.units.started == [(BEGIN, [POINT]), (END, [POINT])]


def test_an_unmount_waits_for_its_unit_until_the_deadline(with_units: Bench) -> None:
    bench = with_units
    volume = served(bench)
    bench.units.duration_s = 60.0
    asked = bench.ask("lock", volume)
    bench.wait(9)
    assert bench.state(volume) is State.DETACHING
    assert [mount.point for mount in bench.kernel.mounts] == [POINT]
    bench.wait(2)
    assert bench.state(volume) is State.LOCKED
    assert asked.result() is None


def test_a_pulled_medium_waits_for_no_unit(with_units: Bench) -> None:
    bench = with_units
    served(bench)
    bench.units.duration_s = 60.0
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []
    assert [unit for unit, _ in bench.units.started] == [BEGIN, END]


def test_a_medium_pulled_while_its_unit_ends_waits_no_longer(with_units: Bench) -> None:
    bench = with_units
    volume = served(bench)
    bench.units.duration_s = 60.0
    asked = bench.ask("lock", volume)
    bench.wait(1)
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert isinstance(asked.exception(), RequestRefusedError)


def test_a_stop_while_the_unit_of_an_unmount_runs_does_not_start_it_again(
    with_units: Bench,
) -> None:
    bench = with_units
    volume = served(bench)
    bench.units.duration_s = 5.0
    asked = bench.ask("lock", volume)
    bench.wait(1)
    bench.begin_stop()
    bench.wait(10)
    assert [unit for unit, _ in bench.units.started] == [BEGIN, END]
    assert bench.kernel.leftovers() == []
    assert asked.done()


def test_a_departure_while_the_unit_of_an_unmount_runs_does_not_start_it_again(
    with_units: Bench,
) -> None:
    bench = with_units
    volume = served(bench)
    bench.units.duration_s = 5.0
    asked = bench.ask("eject", volume)
    bench.wait(1)
    bench.pull()
    bench.wait(10)
    assert [unit for unit, _ in bench.units.started] == [BEGIN, END]
    assert isinstance(asked.exception(), RequestRefusedError)


@pytest.mark.parametrize("step", ["probe", "mount"])
def test_a_volume_that_was_not_mounted_starts_no_unit(with_units: Bench, step: str) -> None:
    bench = with_units
    bench.kernel.fail_next(step, errno.EIO)
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    bench.stop()
    assert bench.units.started == []


def test_a_refused_request_starts_the_on_mount_unit_again(with_units: Bench) -> None:
    bench = with_units
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    with pytest.raises(VolumeBusyError):
        bench.answer("lock", volume)
    assert [unit for unit, _ in bench.units.started] == [BEGIN, END, BEGIN]
    bench.kernel.users.clear()


def test_a_stop_starts_the_on_unmount_unit_too(with_units: Bench) -> None:
    bench = with_units
    served(bench)
    bench.stop()
    assert bench.units.started == [(BEGIN, [POINT]), (END, [POINT])]


def test_a_second_eject_of_a_volume_that_is_still_held_open_is_refused_like_the_first() -> None:
    bench = Bench((replace(RULE, on_busy=OnBusy.DETACH),))
    bench.start()
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = 1
    for _ in range(2):
        with pytest.raises(RequestRefusedError, match=r"is held open"):
            bench.answer("eject", volume)
        assert bench.state(volume) is State.FAILED
    bench.kernel.close_holders()
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED
    bench.stop()
    bench.close()


def reload_with_slow_unit(bench: Bench) -> None:
    """Put other rules into force while the unit before the unmount takes its time."""
    bench.units.duration_s = 5.0
    assert bench._supervisor is not None
    bench._supervisor.reevaluate((replace(UNITS, mount=MountSettings(read_only=True)),))
    bench.wait(1)


@pytest.mark.parametrize("verb", ["unlock", "retry"])
@pytest.mark.parametrize("users", [0, 1])
def test_a_request_to_mount_is_granted_while_changed_rules_take_effect(
    with_units: Bench, verb: str, users: int
) -> None:
    bench = with_units
    volume = served(bench)
    bench.kernel.users["cartridge-01"] = users
    reload_with_slow_unit(bench)
    assert bench.state(volume) is State.DETACHING
    asked = bench.ask(verb, volume)
    bench.wait(20)
    assert asked.result() is None
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.mounts[0].read_only is (users == 0)
    bench.kernel.users.clear()


@pytest.mark.parametrize("after", range(30))
@pytest.mark.parametrize("verb", [None, "retry"])
def test_a_blob_that_appears_at_any_turn_of_an_arrival_is_noticed(
    bench: Bench, after: int, verb: str | None
) -> None:
    bench.settle()
    volume = bench.insert()
    if verb is not None:
        bench.kernel.blobs.clear()
        bench.settle()
        bench.ask(verb, volume)
    bench.kernel.blobs.clear()
    bench.run_turns(after)
    bench.add_blob("cartridge-01.bb")
    check_mounted(bench, volume)


@pytest.mark.parametrize("verb", ["lock", "eject", "unlock", "retry"])
def test_after_a_defect_of_the_agent_a_request_is_refused_at_once(bench: Bench, verb: str) -> None:
    bench.kernel.faults.append(Fault("probe", RuntimeError("a defect")))
    volume = bench.insert()
    bench.settle()
    with pytest.raises(RequestRefusedError, match="a defect of the agent"):
        bench.answer(verb, volume)


def test_a_request_that_waits_when_a_defect_ends_the_lifecycle_is_answered(bench: Bench) -> None:
    bench.settle()
    bench.kernel.faults.append(Fault("probe", RuntimeError("a defect")))
    volume = bench.insert()
    bench.run_turns(3)
    with pytest.raises(RequestRefusedError, match="a defect of the agent"):
        bench.answer("lock", volume)


def test_units_that_a_reload_adds_apply_to_media_that_are_mounted(bench: Bench) -> None:
    volume = served(bench)
    bench.reload_rules(UNITS)
    bench.answer("lock", volume)
    assert bench.units.started == [(END, [POINT])]
