"""Once a medium has gone, nothing is flushed or unmounted before the error table of its mapping."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, OnBusy
from caam_hotplug.config.templates import UnitTemplate
from caam_hotplug.errors import DmError, MountBusyError, UnknownError
from caam_hotplug.model import Disappeared, State, Volume
from fakes.bench import Bench
from fakes.kernel import Fault

(RULE,) = BUILT_IN
IGNORING: Final = (replace(RULE, action=Action.IGNORE),)
TOO_LATE: Final = {"flush", "unmount", "detach"}
"""Steps that may write what is dirty."""
FOREIGN: Final = "0 32768 linear 8:99 0"
LONG_S: Final = 10_000.0

_requests: Final[list[asyncio.Task[Any]]] = []
"""Kept, since the loop keeps no strong reference to its tasks."""


def started() -> Bench:
    bench = Bench()
    bench.start()
    bench.settle()
    return bench


def ended(bench: Bench) -> None:
    """End the faults, pull all media, and check that nothing is left."""
    bench.kernel.faults.clear()
    bench.wait(LONG_S)
    for name in list(bench.kernel.media):
        bench.pull(name)
    bench.settle()
    bench.kernel.close_holders()
    bench.settle()
    bench.cancel()
    left = bench.kernel.leftovers()
    bench.close()
    _requests.clear()
    assert left == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = started()
    yield made
    ended(made)


def pull(bench: Bench) -> None:
    bench.pull()
    bench.settle()


def report(bench: Bench) -> int:
    """Pull the medium, and return how many steps preceded the report to the agent."""
    if bench._supervisor is None:  # the report waits until it has found the mappings
        bench.pull()
        return len(bench.kernel.steps)
    bench.kernel.pull()

    async def take() -> int:
        bench._supervisor.take(Disappeared("sda1"), [])
        return len(bench.kernel.steps)

    return bench.run(take())


def is_cut_off(bench: Bench) -> bool:
    """Whether the first mapping has an error table."""
    live = next(iter(bench.kernel.mappings.values())).live
    return live is not None and live.endswith(" error")


def assert_in_order(steps: list[str], words: str = "") -> None:
    """Check that the error table comes before all that may write.

    The first step may belong to a call that began before the medium had gone.
    """
    late = [number for number, step in enumerate(steps) if step in TOO_LATE]
    if late:
        assert "load_error_table" in steps, f"{words}: {steps}"
        first = steps.index("load_error_table")
        assert all(number > first for number in late if number), f"{words}: {steps}"


def absent(bench: Bench) -> Volume:
    return bench.kernel.insert()


def mounted(bench: Bench) -> Volume:
    volume = bench.insert()
    bench.settle()
    return volume


def used(bench: Bench) -> Volume:
    volume = mounted(bench)
    bench.kernel.users["cartridge-01"] = 1
    return volume


def killed(bench: Bench) -> Volume:
    volume = used(bench)
    bench.kill()
    return volume


def ask(verb: str) -> Callable[[Bench, Volume], None]:
    return lambda bench, volume: _requests.append(bench.ask(verb, volume))


def start_ignoring(bench: Bench, _volume: Volume) -> None:
    bench.rules = IGNORING
    bench.start()


MOMENTS: Final[dict[str, tuple[Callable[[Bench], Volume], Callable[[Bench, Volume], None]]]] = {
    "arrival": (absent, lambda bench, volume: bench.appear(volume)),
    "adoption": (killed, lambda bench, _: bench.start()),
    "release of a leftover": (killed, start_ignoring),
    "lock": (mounted, ask("lock")),
    "lock in use": (used, ask("lock")),
    "eject": (mounted, ask("eject")),
    "stop": (mounted, lambda bench, _: bench.request_stop()),
    "stop in use": (used, lambda bench, _: bench.request_stop()),
}
"""What is done before, and what the departure comes upon."""


def calls_of(moment: str) -> int:
    """Count the calls that the kernel gets if nobody disturbs the moment."""
    before, act = MOMENTS[moment]
    bench = started()
    act(bench, before(bench))
    bench.settle()
    count = len(bench.kernel.steps)
    ended(bench)
    return count


@pytest.mark.parametrize("moment", MOMENTS)
def test_the_error_table_comes_first_whenever_the_medium_goes(moment: str) -> None:
    before, act = MOMENTS[moment]
    turn, undisturbed, whole = 0, -1, calls_of(moment)
    while undisturbed < whole:
        bench = started()
        act(bench, before(bench))
        bench.run_turns(turn)
        undisturbed = len(bench.kernel.steps)
        begin = report(bench)
        bench.settle()
        assert_in_order(bench.kernel.steps[begin:], f"after {turn} turns")
        ended(bench)
        turn += 1
    assert turn > 2


@pytest.mark.parametrize("step", ["flush", "unmount"])
def test_the_error_table_is_loaded_though_a_release_never_returns(bench: Bench, step: str) -> None:
    bench.kernel.faults.append(Fault(step, hangs_s=LONG_S))
    ask("lock")(bench, mounted(bench))
    bench.settle()
    assert not is_cut_off(bench)
    pull(bench)
    assert is_cut_off(bench)


@pytest.mark.parametrize("step", ["probe", "mount"])
def test_the_error_table_is_loaded_though_an_arrival_never_returns(bench: Bench, step: str) -> None:
    bench.kernel.faults.append(Fault(step, hangs_s=LONG_S))
    mounted(bench)
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_though_the_agent_stops_in_a_flush(bench: Bench) -> None:
    mounted(bench)
    bench.kernel.faults.append(Fault("flush", hangs_s=LONG_S))
    bench.begin_stop()
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_though_the_flush_of_a_leftover_never_returns(
    bench: Bench,
) -> None:
    volume = killed(bench)
    bench.kernel.faults.append(Fault("flush", hangs_s=LONG_S))
    start_ignoring(bench, volume)
    bench.settle()
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_of_a_leftover_is_loaded_though_its_volume_is_never_identified(
    bench: Bench,
) -> None:
    object.__setattr__(killed(bench), "identified", False)
    bench.kernel.faults.append(Fault("identify", hangs_s=LONG_S))
    bench.start()
    bench.settle()
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_though_the_worker_of_all_mappings_is_busy(bench: Bench) -> None:
    mounted(bench)
    bench.kernel.faults.append(Fault("load_table", hangs_s=LONG_S))
    bench.insert("cartridge-02", "sdb1")
    bench.settle()
    pull(bench)
    assert is_cut_off(bench)
    assert bench.kernel.mounts == []


def test_the_error_table_is_loaded_while_the_unit_before_the_unmount_runs(bench: Bench) -> None:
    bench.reload_rules(replace(RULE, on_unmount=UnitTemplate("end@{partlabel}.service")))
    bench.units.duration_s = LONG_S
    ask("lock")(bench, used(bench))
    bench.settle()
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_into_a_mapping_that_others_use(bench: Bench) -> None:
    bench.reload_rules(replace(RULE, action=Action.UNLOCK))
    assert bench.state(mounted(bench)) is State.UNLOCKED
    next(iter(bench.kernel.mappings.values())).holders = 1
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_into_a_mapping_that_a_lock_has_left(bench: Bench) -> None:
    bench.reload_rules(replace(RULE, on_busy=OnBusy.DETACH))
    volume = used(bench)
    ask("lock")(bench, volume)
    bench.settle()
    assert bench.state(volume) is State.FAILED
    assert not is_cut_off(bench)
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_though_a_defect_has_ended_the_volumes_service(
    bench: Bench,
) -> None:
    defect = TypeError("a defect")
    bench.kernel.faults.append(Fault("mount", defect))
    bench.kernel.faults.append(Fault("remove_mapping", defect))
    volume = mounted(bench)
    assert bench.state(volume) is State.FAILED
    next(iter(bench.kernel.mappings.values())).is_removed_at_last_close = True
    next(iter(bench.kernel.mappings.values())).holders = 1
    pull(bench)
    assert is_cut_off(bench)


def test_the_error_table_is_loaded_into_a_mapping_that_comes_to_life_after_the_departure(
    bench: Bench,
) -> None:
    bench.kernel.faults.append(Fault("activate_mapping", hangs_s=5.0))
    mounted(bench)
    pull(bench)
    (mapping,) = bench.kernel.mappings.values()
    assert mapping.live is None
    mapping.holders = 1  # a program opens whatever has come
    bench.wait(5.0)
    assert is_cut_off(bench)


@pytest.mark.parametrize("moment", ["lock", "stop"])
def test_an_unmount_that_finds_its_medium_gone_waits_for_the_error_table(
    bench: Bench, moment: str
) -> None:
    before, act = MOMENTS[moment]
    volume = before(bench)
    bench.kernel.faults.append(Fault("flush", hangs_s=5.0))
    bench.kernel.faults.append(Fault("load_error_table", hangs_s=9.0))
    act(bench, volume)
    bench.settle()
    begin = len(bench.kernel.steps)
    pull(bench)
    bench.wait(20.0)
    steps = bench.kernel.steps[begin:]
    assert "unmount" not in steps[: steps.index("load_error_table")]


def test_an_unmount_waits_for_the_error_table_and_not_for_the_medium_to_be_closed(
    bench: Bench,
) -> None:
    mounted(bench)
    bench.kernel.faults.append(Fault("load_error_table", hangs_s=9.0, acts_first=True))
    pull(bench)
    assert bench.kernel.mounts == []
    assert is_cut_off(bench)
    assert "remove_mapping" not in bench.kernel.steps
    bench.wait(9.0)
    assert bench.kernel.mappings == {}


def test_a_change_of_a_mapping_that_is_not_cut_off_yet_leads_to_no_unmount(bench: Bench) -> None:
    mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.kernel.faults.append(Fault("load_error_table", hangs_s=9.0))
    pull(bench)
    bench.kernel.mapping_changed(f"dm-{mapping.number.minor}")
    bench.settle()
    assert bench.kernel.steps[-1] == "has_error_table"
    assert bench.kernel.mounts != []
    bench.wait(9.0)
    assert bench.kernel.mounts == []


def test_a_defect_of_the_check_for_an_error_table_ends_no_reading_of_events(bench: Bench) -> None:
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.kernel.faults.append(Fault("load_error_table", hangs_s=9.0))
    bench.kernel.faults.append(Fault("has_error_table", struct.error("a defect"), lasting=True))
    pull(bench)
    bench.kernel.mapping_changed(f"dm-{mapping.number.minor}")
    bench.wait(9.0)
    assert not bench.has_failed
    assert bench.state(volume) is State.REMOVED_UNSAFELY


def test_a_defect_in_the_error_table_ends_no_other_volumes_service(bench: Bench) -> None:
    other = bench.insert("cartridge-02", "sdb1")
    mounted(bench)
    bench.kernel.faults.append(Fault("load_error_table", TypeError("a defect"), lasting=True))
    pull(bench)
    assert not bench.has_failed
    assert bench.state(other) is State.MOUNTED


def test_the_table_of_a_readers_next_card_is_read_though_the_first_was_only_looked_at(
    bench: Bench,
) -> None:
    bench.kernel.faults.append(Fault("identify", hangs_s=5.0, acts_first=True))
    volume = bench.kernel.insert()
    bench.announce(volume)
    bench.settle()
    change(bench)
    bench.wait(20.0)
    assert bench.kernel.steps[-1] == "read_table"


def test_the_error_table_of_an_orphan_comes_first(bench: Bench) -> None:
    killed(bench)
    bench.kernel.pull()
    begin = len(bench.kernel.steps)
    bench.start()
    bench.settle()
    assert is_cut_off(bench)
    assert_in_order(bench.kernel.steps[begin:])


def test_an_error_table_that_fails_is_tried_again_before_the_unmount(bench: Bench) -> None:
    mounted(bench)
    bench.kernel.fail_next("load_error_table", errno.ENOMEM)
    begin = len(bench.kernel.steps)
    pull(bench)
    steps = bench.kernel.steps[begin:]
    assert steps[: steps.index("unmount")].count("load_error_table") == 2


def lose_key(bench: Bench) -> None:
    bench.kernel.new_session()
    bench.wake()
    bench.settle()


def replace_table(bench: Bench) -> None:
    (mapping,) = bench.kernel.mappings.values()
    bench.by_hand.load(mapping, FOREIGN)
    bench.by_hand.resume(mapping)


def replace_table_while_no_agent_runs(bench: Bench) -> None:
    bench.kill()
    replace_table(bench)
    bench.start()
    bench.settle()
    _requests.append(bench.ask("lock", bench.kernel.media["sda1"].volume))
    bench.settle()


@pytest.mark.parametrize("cut_off", [pull, lose_key, replace_table_while_no_agent_runs])
@pytest.mark.parametrize("in_use", [False, True])
def test_nothing_is_flushed_through_a_table_that_somebody_loads_after_the_error_table(
    bench: Bench, cut_off: Callable[[Bench], None], *, in_use: bool
) -> None:
    mounted(bench)
    written_by: list[str | None] = []
    if in_use:
        bench.kernel.faults.append(Fault("unmount", MountBusyError("x", "x", errno.EBUSY)))

    def before(step: str) -> None:
        if step in ("mounts", "detach") and bench.kernel.mappings and is_cut_off(bench):
            bench.kernel.before = lambda _: None
            replace_table(bench)

    bench.kernel.before = before
    bench.kernel.written_back = lambda mapping, _fails: written_by.append(mapping.live)
    cut_off(bench)
    assert set(written_by) == {"0 32768 error"}
    assert bench.kernel.leftovers() == []


def test_a_medium_without_a_mapping_gets_no_error_table(bench: Bench) -> None:
    volume = mounted(bench)
    bench.answer("lock", volume)
    pull(bench)
    bench.insert("cartridge-02", "sda1", removable=False, bus=None)
    bench.settle()
    pull(bench)
    assert "load_error_table" not in bench.kernel.steps


def test_a_departure_takes_three_steps_more_than_a_release_without_a_flush(bench: Bench) -> None:
    mounted(bench)
    begin = len(bench.kernel.steps)
    pull(bench)
    assert [step for step in bench.kernel.steps[begin:] if step != "mounts"] == [
        "load_error_table", "has_error_table", "has_error_table", "unmount", "remove_mount_point",
        "find_mapping", "remove_mapping", "find_mapping", "mounts",
    ][:-1]  # fmt: skip


def test_of_many_media_that_go_at_once_each_is_cut_off_before_its_unmount(bench: Bench) -> None:
    labels = [(f"cartridge-{number:02}", f"sd{number}1") for number in range(32)]
    for label, name in labels:
        bench.insert(label, name)
    bench.settle()
    begin = len(bench.kernel.steps)
    for _, name in labels:
        bench.pull(name)
    bench.settle()
    for label, _ in labels:
        noted = zip(bench.kernel.steps[begin:], bench.kernel.subjects[begin:], strict=True)
        steps = [step for step, subject in noted if label in subject]
        assert steps[0] == "load_error_table"
        assert set(steps[: steps.index("unmount")]) == {"load_error_table", "has_error_table"}


# readers


def change(bench: Bench) -> Volume:
    """Change the first card for another in its reader, and report that to the agent."""
    following = bench.kernel.change()
    bench.report_absent()
    bench.settle()
    return following


def test_the_next_card_of_a_reader_is_served_once_the_first_is_released(bench: Bench) -> None:
    mounted(bench)
    following = change(bench)
    steps = bench.kernel.steps
    assert steps.index("read_table") > steps.index("remove_mapping")
    bench.appear(following)
    bench.settle()
    assert bench.state(following) is State.MOUNTED
    assert steps.count("read_table") == 1


def test_the_table_of_a_readers_next_card_is_read_when_the_last_volume_is_released(
    bench: Bench,
) -> None:
    first = mounted(bench)
    second = bench.kernel.insert("later", "sda2")
    object.__setattr__(second, "id", replace(first.id, partition=2))
    bench.appear(second)
    bench.settle()
    bench.kernel.faults.append(Fault("unmount", hangs_s=5.0, about={"later"}))
    bench.kernel.pull("sda2")
    bench.report_absent("sda2")
    change(bench)
    assert "read_table" not in bench.kernel.steps
    bench.wait(5.0)
    assert bench.kernel.steps[-1] == "read_table"


def test_the_table_of_a_readers_next_card_is_read_when_an_orphan_is_released(bench: Bench) -> None:
    killed(bench)
    bench.kernel.close_holders()
    bench.kernel.change()
    bench.start()
    bench.settle()
    assert bench.kernel.steps[-1] == "read_table"


def test_a_table_that_cannot_be_read_is_logged(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    mounted(bench)
    bench.kernel.fail_next("read_table", DmError("open", "/dev/sda", errno.ENOMEDIUM))
    change(bench)
    assert "read the new table: open /dev/sda: No medium found" in caplog.text


def test_a_disk_that_cannot_be_looked_at_ends_no_other_volumes_service(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    other = bench.insert("cartridge-02", "sdb1")
    mounted(bench)
    bench.kernel.fail_next("changed_disk", UnknownError("look at", "it", errno.ENFILE))
    pull(bench)
    assert bench.state(other) is State.MOUNTED
    assert "if another medium is in it, plug it again" in caplog.text


def test_after_a_pull_no_table_is_read(bench: Bench) -> None:
    mounted(bench)
    pull(bench)
    assert "read_table" not in bench.kernel.steps
