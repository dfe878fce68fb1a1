"""In every order of events, nothing of the agent is left when no medium is present."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from caam_hotplug.errors import MountError
from caam_hotplug.model import State
from fakes.bench import Bench

ENOUGH_TURNS = 200
STEPS_OF_ARRIVAL = (
    "find_mapping",
    "require_unused",
    "read_blob",
    "import_blob",
    "add_key",
    "create_mapping",
    "load_table",
    "unlink_key",
    "activate_mapping",
    "probe",
    "mount",
)
STEPS_OF_DEPARTURE = ("unmount", "remove_mount_point", "remove_mapping")


def turns_until_settled(act: Callable[[Bench], None]) -> int:
    """Return an upper bound for the turns of the loop that an act takes."""
    bench = Bench()
    bench.start()
    bench.settle()
    act(bench)
    turns = 0
    quiet = 0
    while quiet < 20:
        before = len(bench.kernel.steps) + len(bench.states)
        bench.run_turns(1)
        turns += 1
        quiet = 0 if len(bench.kernel.steps) + len(bench.states) != before else quiet + 1
    bench.stop()
    bench.close()
    assert turns < ENOUGH_TURNS
    return turns


def arrive(bench: Bench) -> None:
    bench.insert()


def test_an_arrival_cancelled_at_every_turn_leaves_nothing() -> None:
    for turn in range(turns_until_settled(arrive)):
        bench = Bench()
        bench.start()
        bench.settle()
        bench.insert()
        bench.run_turns(turn)
        bench.cancel()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.close()


def test_a_departure_cancelled_at_every_turn_leaves_nothing() -> None:
    for turn in range(60):
        bench = Bench()
        bench.start()
        bench.insert()
        bench.settle()
        bench.pull()
        bench.run_turns(turn)
        bench.cancel()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.close()


def test_a_medium_pulled_at_every_turn_of_its_arrival_leaves_nothing_and_comes_back() -> None:
    for turn in range(turns_until_settled(arrive)):
        bench = Bench()
        bench.start()
        bench.settle()
        bench.insert()
        bench.run_turns(turn)
        bench.pull()
        again = bench.insert()
        bench.settle()
        assert bench.state(again) is State.MOUNTED, f"after {turn} turns"
        assert len(bench.kernel.mappings) == 1
        bench.pull()
        bench.settle()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.stop()
        bench.close()


def test_a_stop_at_every_turn_of_an_arrival_leaves_nothing() -> None:
    for turn in range(turns_until_settled(arrive)):
        bench = Bench()
        bench.start()
        bench.settle()
        bench.insert()
        bench.run_turns(turn)
        bench.stop()
        assert bench.kernel.leftovers() == [], f"after {turn} turns: {bench.kernel.steps}"
        bench.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS_OF_ARRIVAL)
def test_the_next_agent_recovers_from_a_kill_around_any_step_of_an_arrival(
    step: str, when: str
) -> None:
    bench = Bench()
    bench.start()
    bench.settle()
    kill_at(bench, step, when)
    volume = bench.insert()
    bench.settle()
    bench.kill()
    bench.kernel.before = lambda _step: None
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert (len(bench.kernel.mappings), len(bench.kernel.mounts)) == (1, 1)
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", STEPS_OF_DEPARTURE)
def test_the_next_agent_releases_the_leftovers_of_a_kill_around_any_step_of_a_departure(
    step: str, when: str
) -> None:
    bench = Bench()
    bench.start()
    bench.insert()
    bench.settle()
    kill_at(bench, step, when)
    bench.pull()
    bench.settle()
    bench.kill()
    bench.kernel.before = lambda _step: None
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []
    bench.stop()
    bench.close()


def kill_at(bench: Bench, step: str, when: str) -> None:
    """Kill the agent right before the step, or right before the step after it."""
    seen = False

    def before(now: str) -> None:
        nonlocal seen
        if (when == "after" and seen) or (when == "before" and now == step):
            assert bench._process is not None
            bench._process.die()
        seen = seen or now == step

    bench.kernel.before = before


def test_thirty_two_media_at_once_are_all_mounted_and_all_gone(bench: Bench) -> None:
    volumes = [bench.insert(f"cartridge-{n:02}", f"sd{n}1") for n in range(32)]
    bench.settle()
    assert {bench.state(volume) for volume in volumes} == {State.MOUNTED}
    assert len(bench.kernel.mounts) == 32
    for volume in volumes:
        bench.pull(volume.name)
    bench.settle()
    assert bench.kernel.leftovers() == []


class Machine(RuleBasedStateMachine):
    """Arrivals, departures, failures, holders, crashes and stops; time may pass in between."""

    names = st.sampled_from(["sda1", "sdb1", "sdc1"])
    labels = st.sampled_from(["cartridge-01", "cartridge-02", "../../etc"])

    @initialize()
    def begin(self) -> None:
        self.bench = Bench()
        self.bench.start()

    @rule(name=names, label=labels)
    def plug(self, name: str, label: str) -> None:
        if name not in self.bench.kernel.media:
            self.bench.insert(label, name)

    @rule(name=names, label=labels)
    def plug_before_udev_reports(self, name: str, label: str) -> None:
        if name not in self.bench.kernel.media:
            self.bench.announce(self.bench.kernel.insert(label, name))

    @rule(name=names)
    def udev_opts_out(self, name: str) -> None:
        if name in self.bench.kernel.media:
            medium = self.bench.kernel.media[name]
            medium.volume = replace(medium.volume, opted_out=True)
            self.bench.appear(medium.volume)

    @rule(name=names)
    def pull(self, name: str) -> None:
        if name in self.bench.kernel.media:
            self.bench.pull(name)

    @rule(name=names)
    def event_without_change(self, name: str) -> None:
        if name in self.bench.kernel.media:
            self.bench.appear(self.bench.kernel.media[name].volume)

    @rule(turns=st.integers(1, 40))
    def time_passes(self, turns: int) -> None:
        self.bench.run_turns(turns)

    @rule(step=st.sampled_from([*STEPS_OF_ARRIVAL, "unmount", "probe"]))
    def a_step_will_fail(self, step: str) -> None:
        if step not in {"find_mapping", "unlink_key"}:  # these tell it what the kernel has
            error = MountError(step, "x", errno.EIO)
            self.bench.kernel.fail_next(step, error)

    @rule()
    def someone_uses_the_mounts(self) -> None:
        for mount in self.bench.kernel.mounts:
            self.bench.kernel.users[mount.point.rsplit("/", 1)[1]] = 1

    @rule()
    def all_holders_close(self) -> None:
        self.bench.kernel.close_holders()

    @precondition(lambda self: self.bench.running)
    @rule()
    def crash(self) -> None:
        self.bench.kill()

    @precondition(lambda self: self.bench.running)
    @rule()
    def stop(self) -> None:
        self.bench.kernel.faults.clear()
        self.bench.stop()

    @precondition(lambda self: not self.bench.running)
    @rule()
    def start(self) -> None:
        self.bench.start()

    @precondition(lambda self: self.bench.running)
    @rule()
    def events_are_lost(self) -> None:
        self.bench.lose_events()

    @invariant()
    def published_states_are_true(self) -> None:
        if not hasattr(self, "bench") or not self.bench.running:
            return
        points = {mount.point for mount in self.bench.kernel.mounts}
        for entry in self.bench.registry.entries():
            if entry.state is State.MOUNTED:
                assert entry.reason.split()[1].rstrip(",") in points

    def teardown(self) -> None:
        bench = self.bench
        if not bench.running:
            bench.start()
            bench.settle()
        bench.kernel.faults.clear()
        for name in list(bench.kernel.media):
            bench.pull(name)
        bench.settle()
        bench.kill()
        bench.kernel.close_holders()
        bench.start()  # the next start releases the leftovers of a failed release
        bench.settle()
        bench.stop()
        bench.kernel.close_holders()
        left = bench.kernel.leftovers()
        bench.close()
        assert left == []


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
