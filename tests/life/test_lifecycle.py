"""A volume's lifecycle over the fake kernel, step by step."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest

from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings, OnStop, Rule
from caam_hotplug.config.templates import Template
from caam_hotplug.errors import DmError, KernelError, MountError, VolumeBusyError
from caam_hotplug.model import DevType, State, Volume, VolumeId
from fakes.bench import Bench
from fakes.kernel import Fault


def test_a_stick_is_unlocked_and_mounted(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/cartridge-01"]
    (mapping,) = bench.kernel.mappings.values()
    assert (
        mapping.live == "0 32768 crypt capi:tk(cbc(aes))-plain :36:logon:caam-hotplug:1-1 0 8:1 0"
    )


def test_the_key_is_in_no_keyring_once_the_mapping_is_live(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    assert bench.kernel.keyrings == [{}]
    steps = bench.kernel.steps
    assert steps.index("unlink_key") < steps.index("activate_mapping") < steps.index("mount")


def test_a_pulled_stick_leaves_nothing(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_pulled_read_only_stick_was_removed_safely(bench: Bench) -> None:
    volume = bench.insert(read_only=True)
    bench.settle()
    assert bench.kernel.mounts[0].read_only
    assert next(iter(bench.kernel.mappings.values())).read_only
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.GONE


def unclean(*, lasting: bool = False, number: int = errno.EROFS) -> Fault:
    """Return the refusal of a mount whose journal has changes."""
    return Fault("mount", MountError("mount", "/dev/dm-0", number), lasting=lasting)


def test_an_unclean_journal_of_a_write_protected_medium_is_left_and_that_is_said(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.kernel.faults.append(unclean())
    volume = bench.insert(read_only=True)
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.MOUNTED,
        "at /run/media/cartridge-01, read-only, without what its journal has",
    )
    assert "mount /dev/dm-0: Read-only file system; it is write-protected, so it is" in caplog.text


@pytest.mark.parametrize(
    ("read_only", "fault"),
    [(False, unclean()), (True, unclean(number=errno.EUCLEAN)), (True, unclean(lasting=True))],
    ids=["a writable medium", "another error", "an error without the journal, too"],
)
def test_a_refusal_for_another_reason_is_an_error(
    bench: Bench, fault: Fault, *, read_only: bool
) -> None:
    bench.kernel.faults.append(replace(fault))
    volume = bench.insert(read_only=read_only)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.kernel.mounts == []
    assert ("without its journal" in bench.reason(volume)) is fault.lasting


def test_an_unsafe_removal_is_shown_until_the_next_arrival(bench: Bench) -> None:
    first = bench.insert()
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(first) is State.REMOVED_UNSAFELY
    bench.insert()
    bench.settle()
    assert bench.state(first) is State.GONE


def test_a_volume_that_no_rule_matches_is_not_touched(bench: Bench) -> None:
    volume = bench.insert("../../etc")
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    assert "'../../etc' cannot be part of a file name" in bench.reason(volume)
    assert set(bench.kernel.steps) <= {"our_mappings", "our_mount_points"}


def test_a_volume_without_a_blob_waits_and_continues_when_the_blob_is_there(bench: Bench) -> None:
    volume = bench.insert()
    bench.kernel.blobs.clear()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.WAITING,
        "no blob /data/caam/cartridge-01.bb",
    )
    bench.kernel.insert("other", "sdz1")
    bench.kernel.pull("sdz1")
    bench.kernel.blobs["cartridge-01.bb"] = bench.kernel.blobs["other.bb"]
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_blob_of_another_board_is_refused_with_the_caams_reason(bench: Bench) -> None:
    volume = bench.insert()
    bench.kernel.blobs["cartridge-01.bb"] = b"foreign"
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.FAILED,
        "the CAAM refused the blob",
    )
    assert bench.kernel.leftovers() == []


def test_a_medium_that_is_noise_under_its_key_is_neither_mounted_nor_mapped(bench: Bench) -> None:
    volume = bench.insert()
    bench.kernel.blobs["cartridge-01.bb"] = b"k" * 36
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert "no known filesystem under this key" in bench.reason(volume)
    assert bench.kernel.leftovers() == []


def test_an_event_without_a_change_does_not_retry_a_failed_volume(
    bench: Bench,
) -> None:
    volume = bench.insert()
    bench.kernel.blobs["cartridge-01.bb"] = b"foreign"
    bench.settle()
    before = list(bench.kernel.steps)
    bench.appear(volume)
    bench.settle()
    assert bench.kernel.steps == before


def test_a_second_medium_with_the_same_label_waits_until_the_first_is_pulled(bench: Bench) -> None:
    first = bench.insert(name="sda1")
    second = bench.insert(name="sdb1")
    bench.settle()
    assert (bench.state(first), bench.state(second)) == (State.MOUNTED, State.CONFLICT)
    assert bench.reason(second) == "/run/media/cartridge-01 belongs to volume 1-1"
    bench.pull("sda1")
    bench.settle()
    assert bench.state(second) is State.MOUNTED


def test_a_medium_in_conflict_that_is_pulled_first_disturbs_no_other(bench: Bench) -> None:
    first = bench.insert(name="sda1")
    second = bench.insert(name="sdb1")
    bench.settle()
    bench.pull("sdb1")
    bench.settle()
    assert (bench.state(first), bench.state(second)) == (State.MOUNTED, State.GONE)


def test_a_mount_point_with_content_is_never_shadowed(bench: Bench) -> None:
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.CONFLICT
    assert (bench.kernel.mappings, bench.kernel.mounts) == ({}, [])
    del bench.kernel.directories["cartridge-01"]


def test_a_conflict_with_the_boards_directory_ends_at_the_next_event_after_it_is_resolved(
    bench: Bench,
) -> None:
    bench.kernel.directories["cartridge-01"] = "content"
    volume = bench.insert()
    bench.settle()
    del bench.kernel.directories["cartridge-01"]
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_directory_of_the_board_outlives_the_mount(bench: Bench) -> None:
    bench.kernel.directories["cartridge-01"] = "board"
    bench.insert()
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.kernel.directories == {"cartridge-01": "board"}


def test_a_pulled_stick_in_use_loses_its_key_and_its_mapping_goes_with_the_last_holder(
    bench: Bench,
) -> None:
    bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    bench.pull()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    assert (mapping.live, mapping.key) == ("0 32768 error", None)
    assert (bench.kernel.mounts, bench.kernel.directories) == ([], {})
    bench.kernel.close_holders()
    assert bench.kernel.mappings == {}


def test_a_stick_that_is_put_back_is_mounted_beside_the_leftovers_of_its_first_insertion(
    bench: Bench,
) -> None:
    bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    bench.pull()
    again = bench.insert()
    bench.settle()
    assert bench.state(again) is State.MOUNTED
    assert len(bench.kernel.mappings) == 2


def test_a_stop_flushes_and_detaches_a_volume_in_use_and_loads_no_error_table(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    bench.stop()
    steps = bench.kernel.steps
    assert steps.index("flush") < steps.index("unmount") < steps.index("detach")
    assert "load_error_table" not in steps
    assert bench.kernel.mounts == []


@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("read_blob", PermissionError(errno.EACCES, "denied")),
        ("import_blob", KernelError("import", "x", errno.EIO)),
        ("add_key", KernelError("add key", "x", errno.EDQUOT)),
        ("create_mapping", errno.EBUSY),
        ("load_table", errno.ENOENT),
        ("activate_mapping", errno.EINVAL),
        ("probe", KernelError("probe", "x", errno.EIO)),
        ("mount", MountError("mount", "x", errno.EINVAL)),
        ("unlink_key", KernelError("unlink", "x", errno.EACCES)),
    ],
)
def test_a_step_that_fails_is_published_and_all_steps_before_it_are_undone(
    bench: Bench, step: str, error: BaseException | int
) -> None:
    bench.kernel.fail_next(step, error)
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert bench.reason(volume) != ""
    bench.pull()  # a failed unlink is repeated at the end of the lifecycle
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_an_unmount_that_fails_is_followed_by_a_detach(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    bench.kernel.fail_next("unmount", MountError("unmount", "x", errno.EIO))
    bench.stop()
    assert bench.kernel.steps.count("detach") == 1
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("step", ["remove_mapping", "remove_mount_point", "flush", "detach"])
def test_a_failing_step_of_a_release_does_not_prevent_the_others(bench: Bench, step: str) -> None:
    bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1 if step == "detach" else 0
    bench.kernel.fail_next(step, MountError("release", "x", errno.EIO))
    bench.stop()
    assert {"flush", "unmount", "remove_mount_point", "remove_mapping"} <= (
        set(bench.kernel.steps) | {step}
    )
    bench.start()  # the next start adopts or releases the leftovers
    bench.settle()


@pytest.mark.parametrize("step", ["remove_mapping", "remove_mount_point"])
def test_a_pulled_medium_that_could_not_be_released_completely_is_published_as_such(
    bench: Bench, step: str
) -> None:
    volume = bench.insert(read_only=True)
    bench.settle()
    bench.kernel.fail_next(step, MountError("release", "x", errno.EIO))
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "could not release it: release x: Input/output error" in bench.reason(volume)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_volume_kept_under_another_name_is_moved_to_the_name_of_its_rule() -> None:
    bench = Bench((Rule(name="keep", on_stop=OnStop.KEEP, match=Match(partlabel="c*")),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    bench.stop()
    bench.rules = (
        Rule(name="new", match=Match(partlabel="c*"), mount=MountSettings(name=Template("new"))),
    )
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/new"]
    bench.stop()
    assert bench.kernel.leftovers() == []
    bench.close()


@pytest.mark.parametrize("step", ["remove_mapping", "remove_mount_point", "flush"])
def test_a_release_that_fails_never_publishes_the_clean_state(bench: Bench, step: str) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kernel.fail_next(step, MountError("release", "x", errno.EIO))
    bench.stop()
    assert bench.state(volume) is State.FAILED
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_rule_that_only_unlocks_leaves_the_mapping_unmounted() -> None:
    bench = Bench((Rule(name="raw", action=Action.UNLOCK, match=Match(partlabel="c*")),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.UNLOCKED
    assert (len(bench.kernel.mappings), bench.kernel.mounts) == (1, [])
    bench.stop()
    assert bench.kernel.leftovers() == []
    bench.close()


def test_a_kept_volume_outlives_a_stop_and_is_adopted_by_the_next_start() -> None:
    bench = Bench((Rule(name="keep", on_stop=OnStop.KEEP, match=Match(partlabel="c*")),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    bench.stop()
    assert len(bench.kernel.mounts) == 1
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps.count("mount") == bench.kernel.steps.count("import_blob") == 1
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


def start_with_another_table(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    bench.kill()
    mapping.live = "0 32768 crypt aes-xts-plain64 :64:logon:caam-hotplug:1-1 0 8:1 0"
    bench.start()
    bench.settle()


def test_a_mapping_with_another_table_is_not_touched_until_its_medium_is_pulled(
    bench: Bench,
) -> None:
    start_with_another_table(bench)
    (volume,) = (medium.volume for medium in bench.kernel.media.values())
    assert bench.state(volume) is State.FAILED
    assert "is not what rule 'built-in' asks for" in bench.reason(volume)
    assert len(bench.kernel.mounts) == 1
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_volume_that_no_rule_matches_any_more_is_released_at_the_next_start(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    bench.rules = ()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    assert bench.kernel.leftovers() == []


def test_leftovers_of_a_medium_that_was_pulled_while_no_agent_ran_are_released(
    bench: Bench,
) -> None:
    bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.pull()
    bench.kernel.directories["stale"] = "ours"
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


KEEP = (Rule(name="keep", on_stop=OnStop.KEEP, match=Match(partlabel="c*")),)


def test_leftovers_of_an_earlier_run_are_released_if_the_medium_is_pulled_before_it_is_identified(
    bench: Bench,
) -> None:
    bench.insert(identified=False)
    bench.settle()
    bench.kill()
    for medium in bench.kernel.media.values():
        object.__setattr__(medium.volume, "identified", False)
    bench.kernel.fail_next("identify", KernelError("read", "x", errno.EIO))
    bench.start()
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("turns", range(1, 40))
def test_a_stop_at_any_turn_of_an_adoption_locks_the_volume_of_the_earlier_run(turns: int) -> None:
    bench = _killed_bench(BUILT_IN)
    bench.start()
    bench.run_turns(turns)
    bench.stop()
    assert bench.kernel.leftovers() == []
    bench.close()


@pytest.mark.parametrize("turns", range(1, 40))
def test_a_stop_at_any_turn_of_an_adoption_keeps_a_volume_whose_rule_says_so(turns: int) -> None:
    bench = _killed_bench(KEEP)
    before = bench.kernel.leftovers()
    bench.start()
    bench.run_turns(turns)
    bench.stop()
    assert bench.kernel.leftovers() == before
    assert {"unmount", "detach", "remove_mapping"}.isdisjoint(bench.kernel.steps)
    bench.close()


def test_after_a_crash_the_mounted_one_of_two_media_with_a_label_keeps_the_mount_point(
    bench: Bench,
) -> None:
    mounted = bench.insert(name="sdb1")
    waiting = bench.insert(name="sda1")
    bench.settle()
    bench.kill()
    bench.kernel.media = dict(reversed(bench.kernel.media.items()))  # in the order of enumeration
    bench.start()
    bench.settle()
    assert (bench.state(mounted), bench.state(waiting)) == (State.MOUNTED, State.CONFLICT)
    bench.pull("sdb1")
    bench.settle()
    assert bench.state(waiting) is State.MOUNTED


def test_a_card_swapped_in_a_reader_that_reports_only_the_disk_is_released(bench: Bench) -> None:
    card = bench.insert()
    bench.appear(_disk_of(card))
    bench.settle()
    assert bench.state(card) is State.MOUNTED
    bench.kernel.pull()
    bench.appear(replace(_disk_of(card), id=VolumeId(99, 0)))
    bench.settle()
    assert bench.state(card) is State.REMOVED_UNSAFELY
    assert bench.kernel.leftovers() == []


def test_disks_that_were_pulled_with_their_partitions_while_events_were_lost_are_released(
    bench: Bench,
) -> None:
    # Many, since departed names are in a set, which has no fixed order.
    cards = [bench.insert(f"card-{n}", f"sd{chr(97 + n)}1") for n in range(8)]
    for card in cards:
        bench.appear(replace(_disk_of(card), name=card.name[:-1]))
    bench.settle()
    for card in cards:
        bench.kernel.pull(card.name)
    bench.lose_events()
    bench.settle()
    assert {bench.state(card) for card in cards} == {State.REMOVED_UNSAFELY}
    assert bench.kernel.leftovers() == []


def test_udevs_report_counts_while_a_volume_is_identified_without_udev(bench: Bench) -> None:
    bench.kernel.faults.append(Fault("identify", hangs_s=60.0))
    volume = bench.insert(identified=False)
    bench.settle()
    bench.appear(replace(volume, identified=True, opted_out=True))
    bench.wait(60)
    assert bench.state(volume) is State.IGNORED
    assert bench.kernel.mappings == {}


def test_lost_events_do_not_release_a_volume_that_udev_does_not_list_at_the_moment(
    bench: Bench,
) -> None:
    volume = bench.insert()
    bench.settle()
    bench.lose_events(listed=False)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert "unmount" not in bench.kernel.steps


def test_a_mapping_whose_table_cannot_be_replaced_is_removed_at_its_last_close(
    bench: Bench,
) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kernel.users["cartridge-01"] = 1
    failure = DmError("load_error_table", "x", errno.ENOMEM)
    bench.kernel.faults.append(Fault("load_error_table", failure, lasting=True))
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "Cannot allocate memory" in bench.reason(volume)
    bench.kernel.close_holders()
    assert bench.kernel.leftovers() == []


def test_a_release_that_fails_after_another_failure_publishes_both(bench: Bench) -> None:
    bench.kernel.fail_next("probe", KernelError("probe", "x", errno.EIO))
    bench.kernel.fail_next("remove_mapping", KernelError("remove", "y", errno.EBUSY))
    volume = bench.insert()
    bench.settle()
    assert bench.reason(volume) == (
        "could not release it: remove y: Device or resource busy; "
        "before that: probe x: Input/output error; "
        "mapping caam-cartridge-01-1-1 is left, and `lock` releases it"
    )


def test_a_defect_in_one_lifecycle_does_not_disturb_the_others(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    healthy = bench.insert("healthy", "sda1")
    bench.settle()
    bench.kernel.fail_next("probe", TypeError("a defect"))
    broken = bench.insert("broken", "sdb1")
    bench.settle()
    assert bench.state(healthy) is State.MOUNTED
    assert (bench.state(broken), bench.reason(broken)) == (
        State.FAILED,
        "a defect of the agent; the journal has the details",
    )
    assert "TypeError: a defect" in caplog.text


def test_a_mount_root_that_cannot_be_listed_prevents_no_volume_from_being_served(
    bench: Bench,
) -> None:
    bench.stop()
    bench.kernel.fail_next("our_mount_points", KernelError("open", "/run/media", errno.ELOOP))
    bench.start()
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_volume_that_waits_behind_anothers_call_is_published_as_stuck_and_is_served_after_it(
    bench: Bench,
) -> None:
    bench.kernel.faults.append(Fault("load_table", hangs_s=60.0))
    slow = bench.insert("slow", "sda1")
    bench.settle()
    waiting = bench.insert("waiting", "sdb1")
    bench.wait(4)
    assert (bench.state(slow), bench.state(waiting)) == (State.STUCK, State.STUCK)
    assert bench.reason(slow) == (
        "load the table: the kernel has not answered for 3 s; still waiting"
    )
    assert bench.reason(waiting) == (
        "look for the mapping: it waits for its turn behind another volume's call for 3 s; "
        "still waiting"
    )
    bench.wait(60)
    assert (bench.state(slow), bench.state(waiting)) == (State.MOUNTED, State.MOUNTED)


def test_each_slow_step_is_published_by_its_name_even_if_one_call_takes_several_steps(
    bench: Bench,
) -> None:
    bench.kernel.faults += [Fault("probe", hangs_s=5.0), Fault("mount", hangs_s=5.0)]
    volume = bench.insert()
    bench.wait(10)
    bench.wait(5)
    stuck = [reason for v, state, reason in bench.states if v == volume and state is State.STUCK]
    assert [reason.partition(":")[0] for reason in stuck] == ["probe", "mount"]
    assert bench.state(volume) is State.MOUNTED


def test_a_volume_pulled_while_it_waits_behind_anothers_call_is_forgotten(bench: Bench) -> None:
    bench.kernel.faults.append(Fault("load_table", hangs_s=60.0))
    bench.insert("slow", "sda1")
    bench.settle()
    waiting = bench.insert("waiting", "sdb1")
    bench.wait(4)
    bench.pull("sdb1")
    bench.wait(60)
    assert bench.state(waiting) is State.GONE
    assert len(bench.kernel.mappings) == 1


def test_a_key_that_could_not_be_unlinked_is_unlinked_when_its_volume_is_pulled(
    bench: Bench,
) -> None:
    error = KernelError("unlink key", "x", errno.ENOMEM)
    bench.kernel.faults.append(Fault("unlink_key", error, lasting=True))
    volume = bench.insert()
    bench.settle()
    assert bench.reason(volume).startswith(
        "could not release it: unlink key x: Cannot allocate memory"
    )
    bench.kernel.faults.clear()
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_mount_point_that_cannot_be_removed_does_not_prevent_the_removal_of_the_others(
    bench: Bench,
) -> None:
    bench.stop()
    bench.kernel.directories.update({"one": "ours", "two": "ours", "three": "ours"})
    bench.kernel.faults.append(
        Fault("remove_mount_point", MountError("remove", "one", errno.EACCES), about={"one"})
    )
    bench.start()
    bench.settle()
    assert bench.kernel.directories == {"one": "ours"}
    bench.stop()
    bench.start()
    bench.settle()
    assert bench.kernel.directories == {}


def test_a_leftover_whose_release_hangs_delays_no_other_volume(bench: Bench) -> None:
    _orphan(bench)
    bench.kernel.faults.append(Fault("unmount", hangs_s=3600.0))
    bench.start()
    healthy = bench.insert("healthy", "sdb1")
    bench.settle()
    assert bench.state(healthy) is State.MOUNTED
    bench.wait(3600)
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/healthy"]


def test_a_volume_whose_mount_point_belongs_to_a_leftover_has_it_after_the_release(
    bench: Bench,
) -> None:
    _orphan(bench)
    bench.kernel.faults.append(Fault("unmount", hangs_s=3600.0))
    bench.start()
    again = bench.insert()
    bench.settle()
    assert (bench.state(again), bench.reason(again)) == (
        State.CONFLICT,
        "/run/media/cartridge-01 belongs to volume 1-1",
    )
    bench.wait(3600)
    assert bench.state(again) is State.MOUNTED
    assert len(bench.kernel.mappings) == 1


def test_leftovers_of_a_medium_that_is_pulled_while_mappings_are_listed_are_released(
    bench: Bench,
) -> None:
    bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.faults.append(Fault("our_mappings", hangs_s=60.0, acts_first=True))
    bench.start()
    bench.settle()
    bench.pull()
    bench.wait(60)
    assert bench.kernel.leftovers() == []


def test_a_volume_that_could_not_be_adopted_is_nevertheless_locked_by_a_stop(
    bench: Bench,
) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.fail_next("find_mapping", errno.ENOMEM)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert len(bench.kernel.mounts) == 1
    bench.stop()
    assert bench.kernel.leftovers() == []


def test_a_mapping_with_another_table_is_released_by_a_stop(bench: Bench) -> None:
    start_with_another_table(bench)
    bench.stop()
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("turns", range(12))
def test_a_kept_volume_that_is_pulled_while_the_agent_stops_is_released_or_kept(
    turns: int, *, read_only: bool
) -> None:
    bench = Bench(KEEP)
    bench.start()
    volume = bench.insert(read_only=read_only)
    bench.settle()
    kept = bench.kernel.leftovers()
    bench.request_stop()
    bench.run_turns(turns)
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() in ([], kept)
    assert bench.state(volume) is not State.GONE or bench.kernel.leftovers() == []
    bench.cancel()
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


def test_a_medium_that_is_pulled_before_it_is_adopted_was_removed_unsafely(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.faults.append(Fault("find_mapping", hangs_s=60.0))
    bench.start()
    bench.settle()
    bench.pull()
    bench.wait(60)
    assert (bench.state(volume), bench.reason(volume)) == (
        State.REMOVED_UNSAFELY,
        "it was mounted read-write; what was written last may be lost",
    )


def test_a_medium_change_while_the_agent_stops_does_not_wait_for_the_old_medium(
    bench: Bench,
) -> None:
    volume = bench.insert("one")
    bench.settle()
    bench.kernel.faults.append(Fault("flush", hangs_s=60.0))
    bench.begin_stop()
    bench.kernel.pull()
    bench.insert("two")
    bench.wait(60)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    bench.kernel.pull()


def test_a_volume_that_failed_by_a_defect_is_forgotten_after_it_was_pulled(bench: Bench) -> None:
    bench.kernel.fail_next("probe", TypeError("a defect"))
    broken = bench.insert("broken", "sda1")
    bench.settle()
    bench.pull()
    bench.settle()
    assert bench.state(broken) is State.REMOVED_UNSAFELY
    healthy = bench.insert("healthy", "sda1")
    bench.settle()
    assert [entry.volume for entry in bench.registry.entries()] == [healthy]


def _killed_and_started_while_udev_is_silent(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    bench.kill()
    bench.unreported_by_udev = {"sda1"}
    bench.start()
    bench.settle()
    return volume


def test_a_mounted_medium_is_adopted_before_udev_reports_it_to_the_next_agent(bench: Bench) -> None:
    volume = _killed_and_started_while_udev_is_silent(bench)
    before = list(bench.kernel.mounts)
    assert bench.state(volume) is State.MOUNTED
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.mounts == before


def test_a_mounted_medium_that_is_pulled_before_udev_reports_it_to_the_next_agent_is_released(
    bench: Bench,
) -> None:
    _killed_and_started_while_udev_is_silent(bench)
    bench.pull()
    bench.settle()
    assert (bench.kernel.mappings, bench.kernel.mounts) == ({}, [])


def test_a_mounted_medium_that_udev_never_reports_is_released_even_if_its_removal_event_was_lost(
    bench: Bench,
) -> None:
    _killed_and_started_while_udev_is_silent(bench)
    bench.lose_events(listed=False)
    bench.settle()
    assert len(bench.kernel.mounts) == 1
    bench.kernel.pull()
    bench.lose_events(listed=False)
    bench.settle()
    assert (bench.kernel.mappings, bench.kernel.mounts) == ({}, [])


def test_a_mounted_medium_that_udev_has_not_reported_is_released_by_a_stop(bench: Bench) -> None:
    _killed_and_started_while_udev_is_silent(bench)
    bench.stop()
    assert (bench.kernel.mappings, bench.kernel.mounts) == ({}, [])


def _orphan(bench: Bench) -> None:
    """Kill the agent, then pull a mounted medium."""
    bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.pull()


def _killed_bench(rules: tuple[Rule, ...]) -> Bench:
    bench = Bench(rules)
    bench.start()
    bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.steps.clear()
    return bench


def _disk_of(volume: Volume) -> Volume:
    disk = VolumeId(volume.id.diskseq, 0)
    return replace(volume, id=disk, name="sda", devtype=DevType.DISK, partlabel=None)


def test_without_udevd_the_volume_is_identified_from_its_partition_table(bench: Bench) -> None:
    volume = bench.insert(identified=False)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps.index("identify") < bench.kernel.steps.index("read_blob")


def test_after_lost_events_the_published_states_are_true(bench: Bench) -> None:
    gone = bench.insert("gone", "sda1")
    bench.settle()
    bench.kernel.pull("sda1")
    come = bench.kernel.insert("come", "sdb1")
    bench.lose_events()
    bench.settle()
    assert (bench.state(gone), bench.state(come)) == (State.REMOVED_UNSAFELY, State.MOUNTED)


def test_a_reader_whose_medium_changed_without_a_remove_event_has_a_new_volume(
    bench: Bench,
) -> None:
    bench.insert("one", "sda1")
    bench.settle()
    bench.kernel.pull("sda1")
    second = bench.insert("two", "sda1")
    bench.settle()
    assert bench.state(second) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1


def test_a_volume_that_appears_again_during_its_release_is_served_afterwards(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    bench.pull()
    bench.kernel.media["sda1"] = _medium_of(bench, volume)
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_an_ignored_volume_with_changed_facts_is_evaluated_again(bench: Bench) -> None:
    volume = bench.insert("no good")
    bench.settle()
    assert bench.state(volume) is State.IGNORED
    bench.kernel.media.clear()
    bench.kernel.diskseq -= 1
    better = bench.insert("good")
    bench.settle()
    assert better.id == volume.id
    assert bench.state(better) is State.MOUNTED


def _medium_of(bench: Bench, volume: object) -> object:
    other = bench.kernel.insert()
    medium = bench.kernel.media.pop(other.name)
    medium.volume = volume  # type: ignore[assignment]
    return medium


def cover(bench: Bench, name: str = "cartridge-01") -> None:
    """Mount something else over the volume's mount."""
    bench.by_hand.cover(f"/run/media/{name}")


@pytest.mark.parametrize("pulled", [False, True])
def test_a_mount_that_others_have_covered_is_nevertheless_released(
    bench: Bench, *, pulled: bool
) -> None:
    volume = bench.insert()
    bench.settle()
    cover(bench)
    if pulled:
        bench.pull()
        bench.settle()
        assert bench.state(volume) is State.REMOVED_UNSAFELY
    else:
        bench.stop()
        assert "flush" in bench.kernel.steps
    assert bench.kernel.leftovers() == []


def test_a_request_does_not_release_a_mount_that_others_have_covered(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    cover(bench)
    with pytest.raises(VolumeBusyError, match="tmpfs is mounted over it"):
        bench.answer("lock", volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_covered_mount_is_adopted(bench: Bench) -> None:
    volume = bench.insert()
    bench.settle()
    cover(bench)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert [mount.source for mount in bench.kernel.mounts][-1] == "tmpfs"


def test_a_mapping_that_is_opened_after_the_first_check_keeps_no_key(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()

    def open_it(step: str) -> None:
        if step == "remove_mapping":
            mapping.holders = 1

    bench.kernel.before = open_it
    bench.pull()
    bench.settle()
    assert mapping.key is None
    assert " error" in (mapping.live or "")
    bench.kernel.before = lambda _step: None
    bench.kernel.close_holders()


@pytest.mark.parametrize("facts", [{"partlabel": None}, {"opted_out": True}])
def test_a_kept_volume_stays_mounted_whatever_its_facts_change_to(
    facts: dict[str, Any],
) -> None:
    bench = Bench((replace(BUILT_IN[0], on_stop=OnStop.KEEP),))
    bench.start()
    volume = bench.insert()
    bench.settle()
    bench.appear(replace(volume, **facts))
    bench.settle()
    bench.stop()
    assert len(bench.kernel.mounts) == 1
    assert "unmount" not in bench.kernel.steps
    bench.close()


def test_a_volume_whose_label_changed_during_a_conflict_is_mounted_under_its_new_label(
    bench: Bench,
) -> None:
    bench.insert()
    bench.settle()
    second = bench.insert(name="sdb1")
    bench.settle()
    bench.kernel.blobs["other.bb"] = bench.kernel.blobs["cartridge-01.bb"]
    bench.appear(replace(second, partlabel="other"))
    bench.settle()
    bench.pull()
    bench.settle()
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/other"]
