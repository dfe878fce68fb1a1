"""An agent that stops for its next run leaves what is mounted, whatever the rules say of a stop."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import BUILT_IN, Action, OnStop, UnitTemplate
from caam_hotplug.model import State
from fakes.bench import Bench

(RULE,) = BUILT_IN


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Bench that has nothing left at its end."""
    made = Bench((replace(RULE, on_unmount=UnitTemplate("end@{partlabel}.service")),))
    made.start()
    made.settle()
    yield made
    if made.running:
        made.stop()
    assert made.kernel.leftovers() == []
    made.close()


@pytest.mark.parametrize("action", [Action.MOUNT, Action.UNLOCK])
def test_what_is_served_stays_as_it_is_and_the_next_run_serves_it(
    bench: Bench, action: Action
) -> None:
    bench.reload_rules(replace(RULE, action=action))
    volume = bench.insert()
    bench.settle()
    before = (bench.state(volume), list(bench.kernel.mounts), dict(bench.kernel.mappings))
    bench.kernel.users["cartridge-01"] = 1
    bench.kernel.steps.clear()
    bench.hand_over()
    bench.start()
    bench.settle()
    after = (bench.state(volume), bench.kernel.mounts, bench.kernel.mappings)
    assert after == before
    assert not {"unmount", "detach", "remove_mapping"} & set(bench.kernel.steps)
    assert not [unit for unit, _ in bench.units.started if unit.startswith("end@")]
    bench.kernel.users.clear()


@pytest.mark.parametrize("turns", range(16))
def test_a_medium_that_is_being_unlocked_is_mounted_by_this_run_or_the_next(
    bench: Bench, turns: int
) -> None:
    volume = bench.insert()
    bench.run_turns(turns)
    bench.hand_over()
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED


def test_a_locked_volume_stays_locked_and_an_ejected_one_is_held_again(bench: Bench) -> None:
    locked, ejected = bench.insert(), bench.insert("cartridge-02", "sdb1")
    bench.settle()
    bench.answer("lock", locked)
    bench.answer("eject", ejected)
    bench.hand_over()
    bench.start()
    bench.settle()
    assert bench.state(locked) is State.LOCKED
    assert bench.kernel.mounts == []


def test_a_medium_that_is_pulled_at_the_hand_over_leaves_nothing(bench: Bench) -> None:
    bench.insert()
    bench.settle()
    bench.hand_over()
    bench.pull()
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_nothing_is_kept_when_the_machine_goes_down(bench: Bench) -> None:
    bench.reload_rules(replace(bench.rules[0], on_stop=OnStop.KEEP))
    bench.insert()
    bench.settle()
    bench.shut_down()
    assert bench.kernel.leftovers() == []
    assert [points for _, points in bench.units.started] == [["/run/media/cartridge-01"]]
