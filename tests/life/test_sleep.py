"""The machine sleeps under mounted volumes, and wakes with the same keys and media, or others."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Final

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, MountSettings
from caam_hotplug.config.templates import UnitTemplate
from caam_hotplug.errors import WritesLostError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import FakeMapping, Fault

OTHER_MEDIUM: Final = ["find_mapping", "plaintexts", "ciphertexts", "load_error_table"]
OTHER_KEY: Final = [
    "find_mapping",
    "plaintexts",
    "ciphertexts",
    "sample",
    "load_error_table",
]
LOST: Final = "it was mounted read-write; what was written last may be lost"


def mounted(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    volume = bench.insert(label, name)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.steps.clear()
    return volume


def wake(bench: Bench) -> None:
    bench.wake()
    bench.settle()


def test_a_sleep_that_changes_nothing_is_not_noticed(bench: Bench) -> None:
    volume = mounted(bench)
    for _ in range(2):
        wake(bench)
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps == ["find_mapping", "plaintexts"] * 2


def test_a_suspended_volume_is_not_read_after_a_sleep_nor_when_it_is_adopted(bench: Bench) -> None:
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    bench.kill()
    bench.start()
    bench.appear(volume)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    bench.stop()
    assert bench.kernel.leftovers() == []


def test_a_volume_whose_key_was_lost_gets_an_error_table_before_anything_else(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.new_session()
    wake(bench)
    assert bench.kernel.steps[: len(OTHER_KEY)] == OTHER_KEY
    assert "flush" not in bench.kernel.steps
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "its key was lost" in bench.reason(volume)
    assert (volume, State.REMOVED_UNSAFELY, LOST) in bench.states
    assert bench.kernel.leftovers() == []


def test_a_volume_whose_key_was_lost_can_be_unlocked_again(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.new_session()
    wake(bench)
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    wake(bench)
    assert bench.state(volume) is State.MOUNTED


def test_a_volume_whose_key_was_lost_can_be_locked_and_has_lost_data(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.new_session()
    wake(bench)
    for _ in range(2):
        with pytest.raises(WritesLostError, match="what was written last may be lost"):
            bench.answer("eject", volume)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    bench.answer("lock", volume)
    assert bench.state(volume) is State.LOCKED
    assert LOST in bench.reason(volume)
    bench.answer("unlock", volume)
    bench.kill()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    with pytest.raises(WritesLostError, match="what was written last may be lost"):
        bench.answer("eject", volume)


def test_a_volume_that_was_mounted_read_only_has_lost_nothing_with_its_key(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, mount=MountSettings(read_only=True)))
    volume = mounted(bench)
    bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED


def test_another_medium_than_before_the_sleep_has_lost_nothing(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.media["sda1"].identifier = b"another GUID"
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED


def test_a_volume_in_use_whose_key_was_lost_keeps_no_key_while_its_users_finish(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    (mapping,) = bench.kernel.mappings.values()
    assert mapping.key is None
    assert bench.kernel.mounts == []
    bench.kernel.close_holders()
    assert bench.kernel.mappings == {}


def test_an_unlocked_volume_is_compared_too(bench: Bench) -> None:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, action=Action.UNLOCK))
    volume = bench.insert()
    bench.settle()
    assert bench.state(volume) is State.UNLOCKED
    bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert bench.kernel.leftovers() == []


def test_another_medium_in_its_place_is_not_written_to(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.media["sda1"].identifier = b"another GUID"
    wake(bench)
    assert bench.kernel.steps[: len(OTHER_MEDIUM)] == OTHER_MEDIUM
    assert "flush" not in bench.kernel.steps
    assert "another medium" in bench.reason(volume)


@pytest.mark.parametrize("step", ["plaintexts", "ciphertexts", "sample"])
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOMEM, errno.EMFILE, errno.ENXIO])
def test_a_comparison_that_fails_tears_nothing_down(bench: Bench, step: str, number: int) -> None:
    volume = mounted(bench)
    bench.kernel.new_session()
    bench.kernel.fail_next(step, number)
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_volume_that_is_written_while_it_is_compared_is_compared_after_the_next_sleep(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.media["sda1"].is_written = True
    bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.media["sda1"].is_written = False
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_medium_pulled_during_the_sleep_has_departed(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.pull()
    wake(bench)
    bench.report_absent()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "key" not in bench.reason(volume)
    assert bench.kernel.leftovers() == []


def test_a_volume_without_its_key_is_listed_until_it_is_pulled(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.new_session()
    wake(bench)
    mounted(bench, "cartridge-02", "sdb1")
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    bench.pull()
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    mounted(bench, "cartridge-03", "sdc1")
    assert bench.state(volume) is State.GONE


def test_every_volume_is_compared_and_one_that_hangs_delays_no_other(bench: Bench) -> None:
    first, second = mounted(bench), mounted(bench, "cartridge-02", "sdb1")
    bench.kernel.new_session()
    bench.kernel.faults.append(Fault("ciphertexts", hangs_s=60, about={"sda1"}))
    wake(bench)
    assert bench.state(first) is State.MOUNTED
    assert bench.state(second) is State.REMOVED_UNSAFELY
    bench.wait(61)
    assert bench.state(first) is State.REMOVED_UNSAFELY


def test_a_stop_of_the_agent_while_it_compares_writes_nothing_under_the_other_key(
    bench: Bench,
) -> None:
    mounted(bench)
    bench.kernel.new_session()
    bench.kernel.faults.append(Fault("ciphertexts", hangs_s=2))
    wake(bench)
    bench.begin_stop()
    bench.wait(3)
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


def test_a_wake_changes_nothing_for_volumes_that_hold_nothing(bench: Bench) -> None:
    volume = mounted(bench)
    bench.answer("lock", volume)
    bench.kernel.steps.clear()
    wake(bench)
    assert bench.state(volume) is State.LOCKED
    bench.answer("unlock", volume)
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps.count("sample") == 1


def test_a_reader_that_refuses_to_read_until_it_is_opened_keeps_its_medium(bench: Bench) -> None:
    volume = mounted(bench)
    bench.kernel.media["sda1"].is_refusing = True
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.media["sda1"].is_refusing = True
    bench.kernel.media["sda1"].identifier = b"another GUID"
    bench.kernel.steps.clear()
    wake(bench)
    assert bench.kernel.steps[: len(OTHER_MEDIUM)] == OTHER_MEDIUM
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def mounted_with_a_unit_before_the_unmount(bench: Bench) -> Volume:
    (rule,) = BUILT_IN
    bench.settle()
    bench.reload_rules(replace(rule, on_unmount=UnitTemplate("end@{partlabel}.service")))
    return mounted(bench)


@pytest.mark.parametrize("end", ["lock", "stop"])
def test_nothing_is_flushed_under_another_key_after_a_sleep_during_the_unit_before_the_unmount(
    bench: Bench, end: str
) -> None:
    volume = mounted_with_a_unit_before_the_unmount(bench)
    bench.units.duration_s = 5
    if end == "lock":
        request = bench.ask("lock", volume)
        bench.settle()
    else:
        bench.begin_stop()
    bench.kernel.new_session()
    bench.wake()
    bench.wait(6)
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []
    if end == "lock":
        assert "its key was lost" in str(request.exception())


def suspended_asleep(bench: Bench) -> tuple[Volume, FakeMapping]:
    """Have somebody suspend a mapping, unseen, before the machine sleeps and its key is lost."""
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    bench.kernel.new_session()
    wake(bench)
    return volume, mapping


def test_a_mapping_that_was_suspended_unseen_is_not_read_after_a_sleep(bench: Bench) -> None:
    volume, _ = suspended_asleep(bench)
    bench.wait(60)
    assert bench.state(volume) is State.MOUNTED
    assert "plaintexts" not in bench.kernel.steps


def test_a_mapping_that_is_resumed_after_a_sleep_is_compared_then(bench: Bench) -> None:
    volume, mapping = suspended_asleep(bench)
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "its key was lost" in bench.reason(volume)
    assert "flush" not in bench.kernel.steps


def test_a_stop_compares_a_mapping_that_it_resumes_after_a_sleep_before_it_flushes(
    bench: Bench,
) -> None:
    suspended_asleep(bench)
    bench.stop()
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


def test_a_mapping_that_is_resumed_as_a_lock_comes_is_compared_before_the_flush(
    bench: Bench,
) -> None:
    volume, mapping = suspended_asleep(bench)
    bench.ask("lock", volume)
    bench.run_turns(3)
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "flush" not in bench.kernel.steps


def test_a_mapping_that_stays_suspended_after_a_sleep_is_said_once(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    volume, _ = suspended_asleep(bench)
    for _ in range(10):
        bench.look(volume)
        bench.wait(2)
    assert caplog.text.count("it is compared when it is resumed") == 1


def adopted_while_suspended(bench: Bench) -> tuple[Volume, FakeMapping]:
    """Have an agent start that finds a mounted volume whose mapping is suspended."""
    volume = bench.insert()
    bench.settle()
    bench.kill()
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    bench.kernel.steps.clear()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    return volume, mapping


def test_a_volume_that_was_suspended_at_its_adoption_is_compared_after_a_sleep(
    bench: Bench,
) -> None:
    volume, mapping = adopted_while_suspended(bench)
    bench.by_hand.resume(mapping)
    bench.settle()
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_noise_is_not_what_later_sleeps_are_compared_with(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    volume, mapping = adopted_while_suspended(bench)
    bench.kernel.new_session()
    wake(bench)
    bench.by_hand.resume(mapping)
    bench.settle()
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    assert not {"sample", "plaintexts"} & set(bench.kernel.steps)
    assert caplog.text.count("cannot compare it after the sleep: nothing was read of it") == 2
    assert "compared after the sleep:" not in caplog.text


@pytest.mark.parametrize("has_key", [True, False])
def test_a_volume_that_is_suspended_in_a_sleep_is_compared_when_it_is_resumed(
    bench: Bench, *, has_key: bool, caplog: pytest.LogCaptureFixture
) -> None:
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    assert "is suspended" in bench.look(volume).reason
    if not has_key:
        bench.kernel.new_session()
    wake(bench)
    assert bench.state(volume) is State.MOUNTED
    assert "it is compared when it is resumed" in caplog.text
    bench.by_hand.resume(mapping)
    bench.settle()
    assert bench.state(volume) is (State.MOUNTED if has_key else State.REMOVED_UNSAFELY)


def test_a_stop_that_resumes_a_mapping_flushes_nothing_under_a_key_that_a_sleep_has_cost(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    bench.look(volume)
    bench.kernel.new_session()
    wake(bench)
    bench.stop()
    assert "resume_mapping" in bench.kernel.steps
    assert "flush" not in bench.kernel.steps
    assert bench.kernel.leftovers() == []


@pytest.mark.parametrize("verb", ["lock", "eject"])
def test_a_mapping_that_is_resumed_while_a_unit_ends_is_compared_before_the_flush(
    bench: Bench, verb: str
) -> None:
    volume = mounted_with_a_unit_before_the_unmount(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.suspend(mapping)
    bench.look(volume)
    bench.kernel.new_session()
    wake(bench)
    bench.units.duration_s = 5
    bench.ask(verb, volume)
    bench.settle()
    bench.by_hand.resume(mapping)
    bench.wait(6)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "flush" not in bench.kernel.steps


def test_a_volume_is_compared_if_the_machine_sleeps_during_the_look_before_a_flush(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kernel.faults.append(Fault("find_mapping", hangs_s=2))
    bench.ask("lock", volume)
    bench.settle()
    bench.kernel.new_session()
    bench.wake()
    bench.wait(3)
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert "flush" not in bench.kernel.steps
