"""A medium is served as soon as the kernel reports it; udev's later report still counts."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from caam_hotplug import names
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, KeySource, MountSettings, Rule
from caam_hotplug.config.templates import Template, UnitTemplate
from caam_hotplug.errors import DeviceLockedError, HotplugError, MountError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import Fault
from life.test_failed_attempts import hold
from life.test_interleavings import turns_until_settled

FACTS = {
    "partuuid": "5ca1ab1e", "parttype": "0fc63daf", "label": "inside", "uuid": "0ff1ce",
    "serial": "AA01", "vendor": "ACME", "model": "Stick", "path": "platform-usb-1",
}  # fmt: skip
TURNS = range(80)


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """Agent that has started and has taken no step for a medium."""
    bench.settle()
    bench.kernel.steps.clear()
    return bench


def known_to_udev(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    """Insert a medium that nobody has reported yet."""
    volume = replace(bench.kernel.insert(label, name), **FACTS)
    bench.kernel.media[name].volume = volume
    return volume


def announced(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    """Insert a medium, report it as the kernel does, and settle."""
    volume = known_to_udev(bench, label, name)
    bench.announce(volume)
    bench.settle()
    return volume


def report(bench: Bench, volume: Volume) -> None:
    """Report the volume as udev does, and settle."""
    bench.appear(volume)
    bench.settle()


def test_a_medium_is_mounted_before_udev_reports_it_and_stays_mounted_afterwards(
    bench: Bench,
) -> None:
    volume = announced(bench)
    assert bench.state(volume) is State.MOUNTED
    steps = list(bench.kernel.steps)
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps == steps
    assert bench.entry(volume).volume == volume


@pytest.mark.parametrize("fact", FACTS)
def test_a_rule_that_matches_a_fact_of_udevs_waits_for_udev(bench: Bench, fact: str) -> None:
    bench.reload_rules(Rule(name="r", match=Match(**{fact: FACTS[fact]})))
    volume = announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED


@pytest.mark.parametrize(
    "rule",
    [
        Rule(name="r", key=KeySource(blob=Template("{serial}.bb"))),
        Rule(name="r", mount=MountSettings(name=Template("{partuuid}"))),
        Rule(name="r", on_mount=UnitTemplate("a@{label}.service")),
        Rule(name="r", on_unmount=UnitTemplate("a@{uuid}.service")),
    ],
    ids=["blob", "mount point", "on_mount", "on_unmount"],
)
def test_a_rule_that_makes_a_name_from_a_fact_of_udevs_waits_for_udev(
    bench: Bench, rule: Rule
) -> None:
    bench.reload_rules(rule)
    bench.kernel.blobs["AA01.bb"] = bench.kernel.blobs["cartridge-01.bb"] = b"x"
    announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])


def test_the_agent_waits_for_udev_if_an_earlier_rule_might_match(bench: Bench) -> None:
    bench.reload_rules(Rule(name="first", match=Match(serial="AA*")), *BUILT_IN)
    volume = announced(bench)
    assert bench.kernel.steps == []
    report(bench, volume)
    assert bench.entry(volume).rule == "first"


def test_the_agent_does_not_wait_for_udev_if_an_earlier_rule_cannot_match(bench: Bench) -> None:
    bench.reload_rules(
        Rule(name="first", match=Match(serial="AA*", partlabel="other-*")), *BUILT_IN
    )
    assert bench.state(announced(bench)) is State.MOUNTED


def test_a_medium_that_no_rule_matches_is_not_read_before_udev_reports_it(
    bench: Bench,
) -> None:
    bench.reload_rules(Rule(name="r", match=Match(partlabel="other-*")))
    volume = announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])
    report(bench, volume)
    assert bench.state(volume) is State.IGNORED


def test_the_label_on_the_medium_counts_and_not_the_kernels_spelling(bench: Bench) -> None:
    volume = known_to_udev(bench, "cartridge/01")
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.settle()
    assert bench.kernel.steps == ["identify"]
    assert bench.states == []
    report(bench, volume)
    assert bench.state(volume) is State.IGNORED


def test_a_medium_that_is_not_finished_is_not_opened(bench: Bench) -> None:
    volume = bench.kernel.insert(parttype=names.UNFINISHED_TYPE)
    bench.announce(volume)
    bench.settle()
    assert bench.kernel.steps == ["identify"]
    report(bench, volume)
    assert bench.reason(volume).startswith("it is not finished")
    assert bench.kernel.steps == ["identify"]


def test_a_medium_that_a_program_has_locked_waits_as_udev_does(bench: Bench) -> None:
    volume = known_to_udev(bench)
    bench.kernel.media["sda1"].is_locked = True
    bench.announce(volume)
    bench.settle()
    assert (bench.kernel.steps, bench.states) == (["identify"], [])
    bench.kernel.media["sda1"].is_locked = False
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED


@pytest.mark.parametrize("in_use", [False, True], ids=["idle", "in use"])
def test_a_medium_that_udev_opts_out_is_released_even_in_use(bench: Bench, in_use: bool) -> None:
    volume = announced(bench)
    if in_use:
        bench.kernel.users["cartridge-01"] = 1
    report(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []
    assert "udev reports something else of it than was known" in [r for _, _, r in bench.states]
    assert bench.state(volume) is (State.FAILED if in_use else State.IGNORED)
    if not in_use:
        assert bench.kernel.mappings == {}


def test_a_missing_blob_is_not_read_again_when_udev_reports_the_medium(
    bench: Bench,
) -> None:
    volume = known_to_udev(bench)
    del bench.kernel.blobs["cartridge-01.bb"]
    bench.announce(volume)
    bench.settle()
    assert bench.state(volume) is State.WAITING
    steps = list(bench.kernel.steps)
    report(bench, volume)
    assert (bench.state(volume), bench.kernel.steps) == (State.WAITING, steps)


@pytest.mark.parametrize(
    ("blob", "ends_in"),
    [(b"foreign", State.FAILED), (None, State.WAITING)],
    ids=["refused", "missing"],
)
@pytest.mark.parametrize("during", ["identify", "require_unused", "read_blob", "nothing"])
@pytest.mark.parametrize("is_overdue", [False, True], ids=["in time", "overdue"])
def test_a_fault_of_a_blob_is_published_once_whenever_udev_reports(
    bench: Bench, blob: bytes | None, ends_in: State, during: str, is_overdue: bool
) -> None:
    volume = known_to_udev(bench)
    bench.kernel.blobs = {} if blob is None else {"cartridge-01.bb": blob}
    bench.kernel.faults.append(Fault(during, hangs_s=1.0))
    bench.announce(volume)
    bench.wait(0.5)
    if is_overdue:  # as Devices.overdue() does
        unknown = dict.fromkeys([*FACTS, "partlabel"])
        bench.appear(replace(volume, **unknown, identified=False))
        bench.wait(5)
    bench.appear(volume)
    bench.wait(5)
    assert bench.state(volume) is ends_in
    assert bench.registry.counters[ends_in.value] == 1


@pytest.mark.parametrize(("label", "is_again"), [("cartridge-01", False), ("cartridge-02", True)])
def test_a_disk_is_read_again_only_if_udev_contradicts_what_is_being_read(
    bench: Bench, label: str, is_again: bool
) -> None:
    volume = known_to_udev(bench)
    bench.kernel.faults.append(Fault("identify", hangs_s=1.0, acts_first=True))
    bench.announce(volume)
    bench.wait(0.5)
    bench.misreport(replace(volume, partlabel=label))
    bench.wait(5)
    assert bench.state(volume) is State.MOUNTED
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/cartridge-01"]
    assert (bench.kernel.steps.count("identify") > 1) is is_again


def test_a_volume_that_failed_before_udevs_report_is_tried_again_after_it(bench: Bench) -> None:
    bench.kernel.fail_next("require_unused", errno.EBUSY)
    volume = announced(bench)
    assert bench.state(volume) is State.FAILED
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_fact_that_udev_could_not_read_contradicts_nothing(bench: Bench) -> None:
    volume = announced(bench)
    report(bench, replace(volume, partlabel=None, parttype=None, partuuid=None))
    assert bench.state(volume) is State.MOUNTED
    assert bench.entry(volume).volume.partlabel == "cartridge-01"


def test_a_corrected_fact_of_udevs_may_change_the_mount(bench: Bench) -> None:
    volume = announced(bench)
    bench.kernel.blobs["spare.bb"] = bench.kernel.blobs["cartridge-01.bb"]
    renamed = replace(volume, partlabel="spare")
    bench.kernel.media["sda1"].volume = renamed
    report(bench, renamed)
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/spare"]
    assert bench.state(volume) is State.MOUNTED


def test_facts_that_change_after_udevs_first_report_release_nothing(bench: Bench) -> None:
    volume = announced(bench)
    report(bench, volume)
    report(bench, replace(volume, opted_out=True))
    assert bench.state(volume) is State.MOUNTED


def test_a_medium_that_udev_never_reports_stays_mounted(bench: Bench) -> None:
    volume = announced(bench)
    report(bench, replace(volume, path=None, serial=None, identified=False))
    assert bench.state(volume) is State.MOUNTED
    assert bench.entry(volume).volume.identified


def test_a_volume_that_waits_for_udev_is_decided_when_udev_takes_too_long(bench: Bench) -> None:
    volume = bench.kernel.insert("other-01")
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.reload_rules(Rule(name="r", match=Match(serial="AA*")), *BUILT_IN)
    assert bench.states == []
    report(bench, replace(volume, identified=False))
    assert bench.state(volume) is State.MOUNTED


def test_a_medium_that_udev_reports_at_any_turn_of_its_arrival_is_mounted() -> None:
    for turn in TURNS:
        with_udev_at(turn, lambda volume: volume, State.MOUNTED)


def test_a_medium_that_udev_opts_out_at_any_turn_of_its_arrival_is_not_touched() -> None:
    for turn in TURNS:
        with_udev_at(turn, lambda volume: replace(volume, opted_out=True), State.IGNORED)


def with_udev_at(turn: int, reported: Callable[[Volume], Volume], ends_in: State) -> None:
    """Report this as udev does, at this turn of the loop after the kernel's report; then pull."""
    bench = Bench()
    bench.start()
    bench.settle()
    volume = known_to_udev(bench)
    bench.announce(volume)
    bench.run_turns(turn)
    bench.appear(reported(volume))
    bench.settle()
    assert bench.state(volume) is ends_in, f"after {turn} turns: {bench.kernel.steps}"
    assert bool(bench.kernel.leftovers()) is (ends_in is State.MOUNTED)
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
    bench.stop()
    bench.close()


@pytest.mark.parametrize("late", [False, True], ids=["never reported", "reported too late"])
def test_a_medium_pulled_before_udev_reports_it_leaves_nothing(late: bool) -> None:
    for turn in range(turns_until_settled(lambda bench: bench.announce(known_to_udev(bench)))):
        bench = Bench()
        bench.start()
        bench.settle()
        bench.announce(known_to_udev(bench))
        bench.run_turns(turn)
        bench.pull()
        if late:  # a departed volume is reported as absent (Devices._events_of)
            bench.report_absent()
        again = announced(bench)
        assert bench.state(again) is State.MOUNTED, f"after {turn} turns"
        bench.pull()
        bench.settle()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.stop()
        bench.close()


def test_an_agent_killed_before_udevs_report_adopts_its_mount_after_a_restart(bench: Bench) -> None:
    volume = announced(bench)
    bench.kill()
    bench.unreported_by_udev.add("sda1")
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_stop_before_udevs_report_leaves_nothing(bench: Bench) -> None:
    announced(bench)
    bench.stop()
    assert bench.kernel.leftovers() == []


def test_a_device_that_a_udev_rule_makes_read_only_is_mounted_read_only(bench: Bench) -> None:
    volume = announced(bench)
    protected = replace(volume, read_only=True)
    bench.kernel.media["sda1"].volume = protected
    report(bench, protected)
    assert [mount.read_only for mount in bench.kernel.mounts] == [True]


@pytest.mark.parametrize("step", ["flush", "unmount"])
def test_a_medium_that_udev_opts_out_is_released_whatever_fails(bench: Bench, step: str) -> None:
    volume = announced(bench)
    bench.kernel.fail_next(step, errno.EIO)
    report(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []
    assert bench.kernel.mappings == {}


def test_udevs_first_report_counts_however_late_it_comes(bench: Bench) -> None:
    volume = announced(bench)
    report(bench, replace(volume, path=None, serial=None, identified=False))
    report(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []


def test_a_card_is_pulled_from_a_reader_that_udev_has_not_reported(bench: Bench) -> None:
    volume = announced(bench)
    bench.kernel.pull("sda1")
    bench.report_absent("sda")
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert bench.kernel.leftovers() == []


def test_a_step_that_began_before_udevs_report_and_failed_is_repeated() -> None:
    for turn in TURNS:
        bench = Bench()
        bench.start()
        bench.settle()
        volume = known_to_udev(bench)
        bench.kernel.fail_next("load_table", errno.EBUSY)
        bench.announce(volume)
        bench.run_turns(turn)
        began_early = "identify" in bench.kernel.steps
        bench.appear(volume)
        bench.settle()
        assert bench.state(volume) is State.MOUNTED or not began_early, f"after {turn} turns"
        bench.pull()
        bench.settle()
        bench.stop()
        bench.close()


def test_a_medium_that_is_identified_slowly_is_decided_without_udev_in_the_end(
    bench: Bench,
) -> None:
    volume = bench.kernel.insert("cartridge/01")
    bench.kernel.answer_delay_s = 40.0
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.wait(30)
    bench.appear(replace(volume, partlabel=None, identified=False))  # as Devices.overdue() does
    bench.wait(60)
    assert bench.state(volume) is State.IGNORED


def test_a_medium_that_was_identified_slowly_does_not_stay_stuck(bench: Bench) -> None:
    volume = bench.kernel.insert("cartridge/01")
    bench.kernel.answer_delay_s = 10.0
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.wait(20)
    assert State.STUCK in [state for _, state, _ in bench.states]
    assert bench.registry.entries() == []


def test_a_conflict_is_published_once_though_udev_reports_afterwards(bench: Bench) -> None:
    volume = known_to_udev(bench)
    bench.kernel.directories["cartridge-01"] = "content"
    bench.announce(volume)
    bench.settle()
    assert bench.state(volume) is State.CONFLICT
    steps = list(bench.kernel.steps)
    bench.appear(volume)
    bench.settle()
    assert (bench.state(volume), bench.kernel.steps) == (State.CONFLICT, steps)
    assert bench.registry.counters[State.CONFLICT.value] == 1
    bench.kernel.directories.clear()


@pytest.mark.parametrize("turn", range(40))
@pytest.mark.parametrize(
    ("step", "error"),
    [
        ("mount", MountError("mount", "x", errno.EIO)),
        ("identify", DeviceLockedError("use /dev/sda: a program has locked it")),
    ],
)
def test_a_report_of_udevs_while_what_a_failed_attempt_has_left_is_looked_at_repeats_it(
    bench: Bench, step: str, error: HotplugError, turn: int
) -> None:
    volume = known_to_udev(bench)
    if step == "mount":
        hold(bench)
    bench.kernel.faults.append(Fault(step, error))
    bench.announce(volume)
    bench.run_turns(turn)
    has_failed = step in bench.kernel.steps
    report(bench, volume)
    assert bench.state(volume) is State.MOUNTED or not has_failed
