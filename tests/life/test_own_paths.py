"""A volume whose rule names a path of its own is mounted there, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest

from caam_hotplug.config.rules import BUILT_IN, MountSettings, Rule
from caam_hotplug.config.templates import PathTemplate
from caam_hotplug.errors import RequestRefusedError
from caam_hotplug.model import State, Volume
from fakes.bench import Bench

(BY_NAME,) = BUILT_IN
SRV: Final = Path("/srv")
POINT: Final = "/srv/recorder"
UNSAFE: Final = "open /srv: /srv can be written by others than root; chmod go-w /srv"


def at(path: str) -> Rule:
    return replace(BY_NAME, mount=MountSettings(path=PathTemplate(path)))


@contextmanager
def bench_at(path: str) -> Iterator[Bench]:
    """Run a bench whose rule names the path; afterwards all is pulled and nothing may be left."""
    bench = Bench((at(path),))
    bench.start()
    yield bench
    for name in list(bench.kernel.media):
        bench.pull(name)
    bench.wait(120)
    while bench.kernel.mounts:  # those of others
        bench.by_hand.umount(bench.kernel.mounts[-1].point)
    bench.stop()
    left = bench.kernel.leftovers()
    bench.close()
    assert left == []


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Bench whose rule names a path."""
    with bench_at(POINT) as made:
        yield made


def points(bench: Bench) -> list[str]:
    return [mount.point for mount in bench.kernel.mounts]


def mounted(bench: Bench, label: str = "cartridge-01", name: str = "sda1") -> Volume:
    volume = bench.insert(label, name)
    bench.settle()
    assert bench.state(volume) is State.MOUNTED
    return volume


def restart(bench: Bench, *rules: Rule) -> None:
    """Kill the agent, and start it with other rules."""
    bench.kill()
    bench.rules = rules
    bench.start()
    bench.settle()


def test_a_volume_is_mounted_at_its_path_and_the_directory_goes_with_it(bench: Bench) -> None:
    volume = mounted(bench)
    assert (points(bench), bench.entry(volume).mount_point) == ([POINT], POINT)
    assert bench.entry(volume).mapping_name == f"caam-recorder-{volume.id}"
    assert bench.kernel.directories == {POINT: "ours"}
    bench.answer("lock", volume)
    assert (points(bench), bench.kernel.directories) == ([], {})


def test_a_directory_of_the_board_is_used_and_kept(bench: Bench) -> None:
    bench.kernel.directories[POINT] = "board"
    volume = mounted(bench)
    bench.answer("eject", volume)
    assert (points(bench), bench.kernel.directories) == ([], {POINT: "board"})


def test_a_path_that_becomes_safe_is_used(bench: Bench) -> None:
    bench.kernel.unsafe_folders[SRV] = UNSAFE
    volume = bench.insert()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (State.CONFLICT, UNSAFE)
    assert (points(bench), bench.kernel.directories) == ([], {})
    bench.kernel.make_safe(SRV)
    bench.wait(2)
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, [POINT])


def test_a_path_that_is_emptied_is_used(bench: Bench) -> None:
    bench.kernel.directories[POINT] = "content"
    volume = bench.insert()
    bench.settle()
    assert (bench.state(volume), bench.reason(volume)) == (
        State.CONFLICT, f"{POINT} is not empty",
    )  # fmt: skip
    bench.kernel.free_mount_point(POINT)
    bench.wait(2)
    assert bench.state(volume) is State.MOUNTED


def test_the_second_volume_of_a_path_gets_it_when_the_first_has_left(bench: Bench) -> None:
    first = mounted(bench)
    second = bench.insert("cartridge-02", "sdb1")
    bench.settle()
    assert bench.reason(second) == f"{POINT} belongs to volume {first.id}"
    bench.pull()
    bench.settle()
    assert (bench.state(second), points(bench)) == (State.MOUNTED, [POINT])


def test_a_mount_at_a_path_is_adopted_after_a_crash(bench: Bench) -> None:
    volume = mounted(bench)
    before = bench.kernel.mounts[:]
    restart(bench, at(POINT))
    assert (bench.state(volume), bench.kernel.mounts) == (State.MOUNTED, before)


@pytest.mark.parametrize("rule", [BY_NAME, at("/srv/other"), at("/srv/recorder/below")])
def test_after_a_crash_and_another_rule_it_is_mounted_where_that_says(
    bench: Bench, rule: Rule
) -> None:
    volume = mounted(bench)
    restart(bench, rule)
    (point,) = points(bench)
    assert bench.state(volume) is State.MOUNTED
    assert point == bench.entry(volume).mount_point != POINT
    assert POINT not in bench.kernel.directories


def test_a_volume_in_the_mount_root_is_moved_to_the_path_of_its_new_rule(bench: Bench) -> None:
    restart(bench, BY_NAME)
    volume = mounted(bench)
    assert points(bench) == ["/run/media/cartridge-01"]
    restart(bench, at(POINT))
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, [POINT])
    assert bench.kernel.directories == {POINT: "ours"}


def test_after_a_crash_without_a_rule_it_is_released_from_its_path(bench: Bench) -> None:
    volume = mounted(bench)
    restart(bench)
    assert bench.state(volume) is State.IGNORED
    assert bench.kernel.leftovers() == []


def test_a_leftover_without_its_medium_is_released_from_its_path(bench: Bench) -> None:
    mounted(bench)
    bench.kill()
    bench.kernel.pull()
    bench.rules = BUILT_IN
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_directory_that_others_have_unmounted_is_removed_after_a_crash(bench: Bench) -> None:
    mounted(bench)
    bench.kill()
    bench.by_hand.umount(POINT)
    bench.kernel.pull()
    bench.rules = BUILT_IN
    bench.start()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_directory_that_was_only_made_is_removed_by_the_next_start(bench: Bench) -> None:
    bench.kernel.directories[POINT] = "ours"
    restart(bench, at("/srv/{partlabel}"))
    assert bench.kernel.leftovers() == []


def test_a_reload_moves_a_volume_to_its_new_path(bench: Bench) -> None:
    volume = mounted(bench)
    assert bench._supervisor is not None
    bench._supervisor.reevaluate((at("/srv/{partlabel}"),))
    bench.settle()
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, ["/srv/cartridge-01"])
    assert bench.kernel.directories == {"/srv/cartridge-01": "ours"}


@pytest.mark.parametrize("path", ["/srv/recorder/below", "/srv"])
def test_no_volume_is_mounted_below_or_over_one_of_an_earlier_rule(bench: Bench, path: str) -> None:
    first = mounted(bench)
    other = at(path)
    kept = replace(at(POINT), name="kept", match=replace(BY_NAME.match, partlabel="cartridge-01"))
    assert bench._supervisor is not None
    bench._supervisor.reevaluate((kept, other))
    second = bench.insert("cartridge-02", "sdb1")
    bench.settle()
    assert bench.state(first) is State.MOUNTED
    assert bench.reason(second) == f"{path} belongs to volume {first.id}"
    bench.pull()
    bench.settle()
    assert (bench.state(second), points(bench)) == (State.MOUNTED, [path])


def test_where_others_have_mounted_it_is_left_to_them_after_a_crash(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.mount(bench.by_hand.mount_at(POINT), "/mnt/recorder")
    restart(bench, at(POINT))
    assert (bench.state(volume), points(bench)) == (State.MOUNTED, [POINT, "/mnt/recorder"])
    bench.by_hand.umount("/mnt/recorder")


def with_another_name_above(bench: Bench) -> Volume:
    volume = mounted(bench)
    bench.by_hand.rename_folder("/srv", "/srv2")
    bench.settle()
    assert bench.entry(volume).mount_point == "/srv2/recorder"
    return volume


def test_a_volume_is_ejected_though_a_directory_above_was_renamed(bench: Bench) -> None:
    volume = with_another_name_above(bench)
    bench.answer("eject", volume)
    assert bench.state(volume) is State.EJECTED
    assert (points(bench), bench.kernel.directories) == ([], {})


def test_a_pulled_volume_leaves_nothing_though_a_directory_above_was_renamed(bench: Bench) -> None:
    with_another_name_above(bench)
    bench.pull()
    bench.settle()
    assert bench.kernel.leftovers() == []


def test_a_volume_that_somebody_has_moved_from_its_path_is_left_to_them(bench: Bench) -> None:
    volume = mounted(bench)
    bench.by_hand.move(POINT, "/srv2/recorder")
    bench.settle()
    with pytest.raises(RequestRefusedError, match="it is mounted at /srv2/recorder"):
        bench.answer("eject", volume)
    bench.by_hand.umount("/srv2/recorder")
