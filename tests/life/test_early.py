"""Served as soon as the kernel tells of it; whatever udev says of it later is heard."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest

from caam_hotplug import names
from caam_hotplug.config.match import Match
from caam_hotplug.config.rules import BUILT_IN, KeySource, MountSettings, Rule
from caam_hotplug.config.templates import Template, UnitTemplate
from caam_hotplug.model import State, Volume
from fakes.bench import Bench
from fakes.kernel import Fault
from life.test_interleavings import turns_until_settled

FACTS = {
    "partuuid": "5ca1ab1e", "parttype": "0fc63daf", "label": "inside", "uuid": "0ff1ce",
    "serial": "AA01", "vendor": "ACME", "model": "Stick", "path": "platform-usb-1",
}  # fmt: skip
TURNS = range(80)


@pytest.fixture
def bench(bench: Bench) -> Bench:
    """An agent that has started, and has taken no step for anybody."""
    bench.settle()
    bench.kernel.steps.clear()
    return bench


def known_to_udev(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    """A medium is there, and nobody has told of it yet."""
    volume = replace(bench.kernel.insert(label, name), **FACTS)
    bench.kernel.media[name].volume = volume
    return volume


def announced(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    """The kernel has told of a medium, and all that follows from that has happened."""
    volume = known_to_udev(bench, label, name)
    bench.announce(volume)
    bench.settle()
    return volume


def tell(bench: Bench, volume: Volume) -> None:
    """udev has told of the volume, and all that follows from that has happened."""
    bench.appear(volume)
    bench.settle()


def test_a_medium_is_mounted_before_udev_tells_of_it_and_stays_so_afterwards(bench: Bench) -> None:
    volume = announced(bench)
    assert bench.state(volume) is State.MOUNTED
    steps = list(bench.kernel.steps)
    tell(bench, volume)
    assert bench.state(volume) is State.MOUNTED
    assert bench.kernel.steps == steps
    assert bench.entry(volume).volume == volume


@pytest.mark.parametrize("fact", FACTS)
def test_a_rule_that_asks_for_what_only_udev_knows_waits_for_it(bench: Bench, fact: str) -> None:
    bench.renew(Rule(name="r", match=Match(**{fact: FACTS[fact]})))
    volume = announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])
    tell(bench, volume)
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
def test_a_rule_that_takes_a_name_of_what_only_udev_knows_waits_for_it(
    bench: Bench, rule: Rule
) -> None:
    bench.renew(rule)
    bench.kernel.blobs["AA01.bb"] = bench.kernel.blobs["cartridge-01.bb"] = b"x"
    announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])


def test_a_rule_before_the_one_that_matches_is_waited_for_if_it_might_match(bench: Bench) -> None:
    bench.renew(Rule(name="first", match=Match(serial="AA*")), *BUILT_IN)
    volume = announced(bench)
    assert bench.kernel.steps == []
    tell(bench, volume)
    assert bench.entry(volume).rule == "first"


def test_a_rule_that_cannot_match_anyway_is_not_waited_for(bench: Bench) -> None:
    bench.renew(Rule(name="first", match=Match(serial="AA*", partlabel="other-*")), *BUILT_IN)
    assert bench.state(announced(bench)) is State.MOUNTED


def test_a_medium_that_no_rule_matches_is_not_even_looked_at_before_udev_tells(
    bench: Bench,
) -> None:
    bench.renew(Rule(name="r", match=Match(partlabel="other-*")))
    volume = announced(bench)
    assert (bench.kernel.steps, bench.states) == ([], [])
    tell(bench, volume)
    assert bench.state(volume) is State.IGNORED


def test_the_label_on_the_medium_counts_and_not_the_kernels_spelling_of_it(bench: Bench) -> None:
    volume = known_to_udev(bench, "cartridge/01")
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.settle()
    assert bench.kernel.steps == ["identify"]
    assert bench.states == []
    tell(bench, volume)
    assert bench.state(volume) is State.IGNORED


def test_a_medium_that_is_not_finished_is_not_opened(bench: Bench) -> None:
    volume = bench.kernel.insert(parttype=names.UNFINISHED_TYPE)
    bench.announce(volume)
    bench.settle()
    assert bench.kernel.steps == ["identify"]
    tell(bench, volume)
    assert bench.said(volume).startswith("it is not finished")
    assert bench.kernel.steps == ["identify"]


def test_a_medium_that_a_program_has_for_itself_waits_as_udev_does(bench: Bench) -> None:
    volume = known_to_udev(bench)
    bench.kernel.media["sda1"].is_locked = True
    bench.announce(volume)
    bench.settle()
    assert (bench.kernel.steps, bench.states) == (["identify"], [])
    bench.kernel.media["sda1"].is_locked = False
    tell(bench, volume)
    assert bench.state(volume) is State.MOUNTED


@pytest.mark.parametrize("in_use", [False, True], ids=["idle", "in use"])
def test_a_medium_that_udev_opts_out_is_let_go_whoever_uses_it(bench: Bench, in_use: bool) -> None:
    volume = announced(bench)
    if in_use:
        bench.kernel.users["cartridge-01"] = 1
    tell(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []
    assert "udev reports something else of it than was known" in [r for _, _, r in bench.states]
    assert bench.state(volume) is (State.FAILED if in_use else State.IGNORED)
    if not in_use:
        assert bench.kernel.mappings == {}


def test_a_blob_that_is_missing_or_refused_is_not_looked_at_again_when_udev_tells(
    bench: Bench,
) -> None:
    volume = known_to_udev(bench)
    del bench.kernel.blobs["cartridge-01.bb"]
    bench.announce(volume)
    bench.settle()
    assert bench.state(volume) is State.WAITING
    steps = list(bench.kernel.steps)
    tell(bench, volume)
    assert (bench.state(volume), bench.kernel.steps) == (State.WAITING, steps)


@pytest.mark.parametrize(
    ("blob", "ends_in"),
    [(b"foreign", State.FAILED), (None, State.WAITING)],
    ids=["refused", "missing"],
)
@pytest.mark.parametrize("during", ["identify", "require_unused", "read_blob", "nothing"])
@pytest.mark.parametrize("is_overdue", [False, True], ids=["in time", "overdue"])
def test_a_fault_of_a_blob_is_told_once_whenever_udev_tells(
    bench: Bench, blob: bytes | None, ends_in: State, during: str, is_overdue: bool
) -> None:
    volume = known_to_udev(bench)
    bench.kernel.blobs = {} if blob is None else {"cartridge-01.bb": blob}
    bench.kernel.faults.append(Fault(during, hangs_s=1.0))
    bench.announce(volume)
    bench.wait(0.5)
    if is_overdue:  # as Devices.overdue() has it
        known_by_none = dict.fromkeys([*FACTS, "partlabel"])
        bench.appear(replace(volume, **known_by_none, identified=False))
        bench.wait(5)
    bench.appear(volume)
    bench.wait(5)
    assert bench.state(volume) is ends_in
    assert bench.registry.counters[ends_in.value] == 1


def test_what_failed_before_udev_had_told_is_tried_again_when_it_has(bench: Bench) -> None:
    bench.kernel.fail_next("require_unused", errno.EBUSY)
    volume = announced(bench)
    assert bench.state(volume) is State.FAILED
    tell(bench, volume)
    assert bench.state(volume) is State.MOUNTED


def test_what_udev_could_not_read_contradicts_nothing(bench: Bench) -> None:
    volume = announced(bench)
    tell(bench, replace(volume, partlabel=None, parttype=None, partuuid=None))
    assert bench.state(volume) is State.MOUNTED
    assert bench.entry(volume).volume.partlabel == "cartridge-01"


def test_what_udev_knows_better_may_mean_another_mount(bench: Bench) -> None:
    volume = announced(bench)
    bench.kernel.blobs["spare.bb"] = bench.kernel.blobs["cartridge-01.bb"]
    renamed = replace(volume, partlabel="spare")
    bench.kernel.media["sda1"].volume = renamed
    tell(bench, renamed)
    assert [mount.point for mount in bench.kernel.mounts] == ["/run/media/spare"]
    assert bench.state(volume) is State.MOUNTED


def test_facts_that_change_later_let_go_of_nothing(bench: Bench) -> None:
    volume = announced(bench)
    tell(bench, volume)
    tell(bench, replace(volume, opted_out=True))
    assert bench.state(volume) is State.MOUNTED


def test_a_medium_that_udev_never_tells_of_stays_mounted(bench: Bench) -> None:
    volume = announced(bench)
    tell(bench, replace(volume, path=None, serial=None, identified=False))
    assert bench.state(volume) is State.MOUNTED
    assert bench.entry(volume).volume.identified


def test_what_was_waiting_for_udev_is_decided_when_that_takes_too_long(bench: Bench) -> None:
    volume = bench.kernel.insert("other-01")
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.renew(Rule(name="r", match=Match(serial="AA*")), *BUILT_IN)
    assert bench.states == []
    tell(bench, replace(volume, identified=False))
    assert bench.state(volume) is State.MOUNTED


def test_a_medium_told_of_at_every_turn_of_its_arrival_is_mounted() -> None:
    for turn in TURNS:
        with_udev_at(turn, lambda volume: volume, State.MOUNTED)


def test_a_medium_opted_out_at_every_turn_of_its_arrival_is_left_alone() -> None:
    for turn in TURNS:
        with_udev_at(turn, lambda volume: replace(volume, opted_out=True), State.IGNORED)


def with_udev_at(turn: int, told: Callable[[Volume], Volume], ends_in: State) -> None:
    """udev tells this at this turn of the loop after the kernel; then it is pulled."""
    bench = Bench()
    bench.start()
    bench.settle()
    volume = known_to_udev(bench)
    bench.announce(volume)
    bench.turns(turn)
    bench.appear(told(volume))
    bench.settle()
    assert bench.state(volume) is ends_in, f"after {turn} turns: {bench.kernel.steps}"
    assert bool(bench.kernel.leftovers()) is (ends_in is State.MOUNTED)
    bench.yank()
    bench.settle()
    assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
    bench.stop()
    bench.close()


@pytest.mark.parametrize("late", [False, True], ids=["never told", "told of too late"])
def test_a_medium_pulled_before_udev_has_told_of_it_leaves_nothing(late: bool) -> None:
    for turn in range(turns_until_settled(lambda bench: bench.announce(known_to_udev(bench)))):
        bench = Bench()
        bench.start()
        bench.settle()
        bench.announce(known_to_udev(bench))
        bench.turns(turn)
        bench.yank()
        if late:  # what has left is told of as that (Devices._events_of)
            bench.yanked()
        again = announced(bench)
        assert bench.state(again) is State.MOUNTED, f"after {turn} turns"
        bench.yank()
        bench.settle()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.stop()
        bench.close()


def test_an_agent_killed_before_udev_has_told_adopts_what_it_had_mounted(bench: Bench) -> None:
    volume = announced(bench)
    bench.kill()
    bench.untold.add("sda1")
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert len(bench.kernel.mounts) == 1
    tell(bench, volume)
    assert bench.state(volume) is State.MOUNTED


def test_a_stop_before_udev_has_told_leaves_nothing(bench: Bench) -> None:
    announced(bench)
    bench.stop()
    assert bench.kernel.leftovers() == []


def test_a_device_that_a_udev_rule_makes_read_only_is_mounted_read_only(bench: Bench) -> None:
    volume = announced(bench)
    protected = replace(volume, read_only=True)
    bench.kernel.media["sda1"].volume = protected
    tell(bench, protected)
    assert [mount.read_only for mount in bench.kernel.mounts] == [True]


@pytest.mark.parametrize("step", ["flush", "unmount"])
def test_a_medium_that_udev_opts_out_goes_whatever_fails_meanwhile(bench: Bench, step: str) -> None:
    volume = announced(bench)
    bench.kernel.fail_next(step, errno.EIO)
    tell(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []
    assert bench.kernel.mappings == {}


def test_udevs_first_word_counts_however_late_it_comes(bench: Bench) -> None:
    volume = announced(bench)
    tell(bench, replace(volume, path=None, serial=None, identified=False))
    tell(bench, replace(volume, opted_out=True))
    assert bench.kernel.mounts == []


def test_a_card_leaves_a_reader_of_which_udev_has_not_told(bench: Bench) -> None:
    volume = announced(bench)
    bench.kernel.yank("sda1")
    bench.yanked("sda")
    bench.settle()
    assert bench.state(volume) is State.REMOVED_UNSAFELY
    assert bench.kernel.leftovers() == []


def test_a_step_that_fails_though_it_began_before_udev_told_is_taken_again() -> None:
    for turn in TURNS:
        bench = Bench()
        bench.start()
        bench.settle()
        volume = known_to_udev(bench)
        bench.kernel.fail_next("load_table", errno.EBUSY)
        bench.announce(volume)
        bench.turns(turn)
        began_early = "identify" in bench.kernel.steps
        bench.appear(volume)
        bench.settle()
        assert bench.state(volume) is State.MOUNTED or not began_early, f"after {turn} turns"
        bench.yank()
        bench.settle()
        bench.stop()
        bench.close()


def test_a_medium_that_is_slow_to_be_identified_is_decided_without_udev_in_the_end(
    bench: Bench,
) -> None:
    volume = bench.kernel.insert("cartridge/01")
    bench.kernel.answers_in_s = 40.0
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.wait(30)
    bench.appear(replace(volume, partlabel=None, identified=False))  # as Devices.overdue() has it
    bench.wait(60)
    assert bench.state(volume) is State.IGNORED


def test_a_medium_that_was_slow_to_be_identified_is_not_called_stuck_for_ever(bench: Bench) -> None:
    volume = bench.kernel.insert("cartridge/01")
    bench.kernel.answers_in_s = 10.0
    bench.announce(replace(volume, partlabel="cartridge-01"))
    bench.wait(20)
    assert State.STUCK in [state for _, state, _ in bench.states]
    assert bench.registry.entries() == []
