"""What a run of the agent has left at a path is known to the next one, and nothing else is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from caam_hotplug.config.rules import Action, Rule
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.model import Mount, State
from fakes.bench import Bench
from fakes.kernel import Fault
from life.test_own_paths import BY_NAME, POINT, at, bench_at, mounted, points, restart


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Bench whose rule names a path."""
    with bench_at(POINT) as made:
        yield made


def named(rule: Rule, label: str) -> Rule:
    return replace(rule, name=label, match=replace(rule.match, partlabel=label))


def killed_while_mounted(bench: Bench) -> None:
    mounted(bench)
    bench.kill()


def with_others_mount_at_the_former_path(bench: Bench) -> None:
    restart(bench, BY_NAME)
    assert points(bench) == ["/run/media/cartridge-01"]
    bench.by_hand.mount(bench.by_hand.mount_at("/run/media/cartridge-01"), POINT)


def test_a_mount_of_others_at_a_path_that_was_released_is_not_the_agents(bench: Bench) -> None:
    volume = mounted(bench)
    with_others_mount_at_the_former_path(bench)
    restart(bench, BY_NAME)
    assert bench.state(volume) is State.MOUNTED
    assert POINT in points(bench)


def test_an_eject_is_refused_where_others_have_mounted_it_at_a_former_path(bench: Bench) -> None:
    volume = mounted(bench)
    with_others_mount_at_the_former_path(bench)
    with pytest.raises(RequestRefusedError, match=f"it is mounted at {POINT}"):
        bench.answer("eject", volume)
    assert points(bench) == ["/run/media/cartridge-01", POINT]


def test_a_mount_that_was_adopted_is_released_by_a_later_run(bench: Bench) -> None:
    restart(bench, replace(BY_NAME, action=Action.UNLOCK))
    bench.insert()
    bench.settle()
    (mapping,) = bench.kernel.mappings.values()
    node = f"/dev/dm-{mapping.number.minor}"
    by_others = Mount(mapping.number, POINT, node, False, "ext4", stops_at_errors=True)
    bench.by_hand.mount(by_others, POINT)
    restart(bench, at(POINT))
    (entry,) = bench.registry.entries()
    assert (entry.state, entry.mount_point) == (State.MOUNTED, POINT)
    bench.kill()
    bench.kernel.pull()
    bench.rules = (BY_NAME,)
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_directory_that_others_have_unmounted_goes_when_the_rule_has_another_place(
    bench: Bench,
) -> None:
    volume = mounted(bench)
    bench.kill()
    bench.by_hand.umount(POINT)
    bench.rules = (BY_NAME,)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    assert POINT not in bench.kernel.directories


@pytest.mark.parametrize("to", ["/srv/a", None])
def test_nothing_is_mounted_in_what_is_left_until_that_is_released(
    bench: Bench, to: str | None
) -> None:
    killed_while_mounted(bench)
    moved = [] if to is None else [named(at(to), "cartridge-01")]
    bench.rules = (*moved, named(at(f"{POINT}/below"), "cartridge-02"))
    second = bench.kernel.insert("cartridge-02", "sdb1")
    bench.kernel.faults.append(Fault("flush", hangs_s=60, about={POINT}))  # much to write
    bench.start()
    bench.wait(5)
    assert POINT in points(bench)
    assert bench.reason(second) == f"/dev/dm-1 is mounted at {POINT}, above {POINT}/below"
    bench.wait(120)
    assert POINT not in points(bench)
    assert bench.state(second) is State.MOUNTED


def test_nothing_is_mounted_over_what_is_left(bench: Bench) -> None:
    killed_while_mounted(bench)
    bench.rules = (named(at("/srv"), "cartridge-02"),)
    second = bench.kernel.insert("cartridge-02", "sdb1")
    bench.kernel.faults.append(Fault("flush", hangs_s=60, about={POINT}))
    bench.start()
    bench.wait(5)
    assert bench.reason(second) == f"/dev/dm-1 is mounted at {POINT}, below /srv"
    bench.wait(120)
    assert bench.state(second) is State.MOUNTED


def test_the_path_of_an_orphan_is_reserved_while_its_directory_is_removed(bench: Bench) -> None:
    killed_while_mounted(bench)
    bench.by_hand.umount(POINT)
    bench.kernel.pull()
    (name,) = (mapping.name for mapping in bench.kernel.mappings.values())
    bench.kernel.faults.append(Fault("load_error_table", hangs_s=10, about={name}))
    bench.start()
    second = bench.insert("cartridge-02", "sdb1")
    owners = []

    def before(step: str) -> None:
        if step == "remove_mount_point":
            owners.append(bench._context.mount_points.owner(POINT))

    bench.kernel.before = before
    bench.wait(30)
    assert owners
    assert second.id not in owners
    assert bench.state(second) is State.MOUNTED


@pytest.mark.parametrize("rule", [BY_NAME, at(POINT)])
def test_a_mounted_volume_whose_mapping_is_suspended_is_adopted(bench: Bench, rule: Rule) -> None:
    restart(bench, rule)
    volume = mounted(bench)
    (mapping,) = bench.kernel.mappings.values()
    bench.kill()
    bench.by_hand.suspend(mapping)
    bench.start()
    bench.settle()
    assert bench.state(volume) is State.MOUNTED, bench.reason(volume)
    bench.by_hand.resume(mapping)


def test_a_folder_that_does_not_answer_keeps_no_volume_waiting(bench: Bench) -> None:
    bench.kill()
    bench.kernel.directories["/srv/other"] = "ours"
    bench.kernel.faults.append(Fault("our_paths", hangs_s=3600))
    bench.rules = (named(BY_NAME, "other"), at("/srv/{partlabel}"))
    volume = bench.kernel.insert("other", "sdb1")
    bench.start()
    bench.wait(1)
    assert bench.state(volume) is State.MOUNTED
    bench.answer("lock", volume)
    bench.wait(3600)
    assert bench.kernel.directories == {}
