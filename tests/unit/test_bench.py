"""How `make bench` tells its figures, and how it reads what the kernel tells."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import cycles, figures, watcher


def cycle(times: float, memory: float = 1000, left: Sequence[str] = ()) -> dict[str, Any]:
    """A cycle in which everything took so long, but for what was left."""
    taken = {column.key: memory if column.unit == "MB" else times for column in figures.COLUMNS}
    last = {"removed_to_nothing_left": None if left else times, "removed_to_rest_gone": times}
    return {**taken, **last, "left": list(left)}


def report(**systems: list[dict[str, Any]]) -> figures.Report:
    return figures.with_figures(
        {
            "date": "2026-11-25",
            "medium": "disks of scsi_debug",
            "machine": {"kernel": "6.1.0", "architecture": "x86_64", "cpus": 2},
            "systems": {
                name: {"what": f"what {name} is", "cycles": found}
                for name, found in systems.items()
            },
        }
    )


def verdicts(told: figures.Report) -> dict[str, bool]:
    return {goal["title"]: goal["met"] for goal in told["goals"]}


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [(1, 95, 1), (12, 95, 12), (20, 95, 19), (100, 95, 95), (4, 50, 2)],
)
def test_a_percentile_is_a_value_that_was_measured(count: int, percent: float, rank: int) -> None:
    values = [float(value) for value in range(count, 0, -1)]
    assert figures.percentile(values, percent) == rank


def test_a_system_has_its_median_and_its_ratio_to_the_limit_of_the_same_run() -> None:
    told = report(L=[cycle(10), cycle(20), cycle(90)], agent=[cycle(30), cycle(50), cycle(31)])
    figure = told["systems"]["agent"]["figures"]["own_cpu"]
    assert figure == {"median": 31, "p95": 50, "min": 30, "max": 50, "ratio": 31 / 20}
    assert told["noise"]["udev_add_to_mounted"] == 9


def test_without_the_limit_there_are_no_ratios_and_only_absolute_goals() -> None:
    told = report(agent=[cycle(30)])
    assert told["systems"]["agent"]["figures"]["own_cpu"]["ratio"] is None
    assert list(verdicts(told)) == ["RSS"]
    assert "noise unknown" in figures.table(told)
    assert " x" not in figures.table(told).splitlines()[5]


def test_one_cycle_tells_nothing_of_the_noise() -> None:
    assert "noise unknown" in figures.table(report(L=[cycle(10)], agent=[cycle(30)]))


def test_a_system_that_uses_nothing_has_no_ratio_to_nothing() -> None:
    told = report(L=[cycle(0)], S=[cycle(5)])
    assert told["systems"]["S"]["figures"]["own_cpu"]["ratio"] is None


def test_a_goal_is_met_up_to_its_bound_and_missed_beyond() -> None:
    told = report(L=[cycle(100)], agent=[cycle(150, memory=20e6 / 1024)])
    assert verdicts(told) == {
        "udev add -> mounted": True,
        "kernel add -> mounted": False,
        "removed -> nothing left": True,
        "own CPU": True,
        "RSS": True,
    }
    assert not verdicts(report(L=[cycle(1)], agent=[cycle(1, memory=20_000)]))["RSS"]


def test_what_is_left_behind_is_never_gone_and_said_below() -> None:
    left = [cycle(30), cycle(50, left=["mapping"]), cycle(40, left=["mapping", "key"])]
    told = report(L=[cycle(10)], agent=left)
    figure = told["systems"]["agent"]["figures"]["removed_to_nothing_left"]
    assert (figure["median"], figure["min"], figure["ratio"]) == (None, 30, None)
    assert not verdicts(told)["removed -> nothing left"]
    assert "agent leaves behind: key, mapping; all else is gone after 40.0 (50.0) ms" in (
        figures.table(told)
    )
    assert ">never<" in figures.chart(told)


def test_without_the_agent_nothing_is_said_of_its_goals() -> None:
    told = report(L=[cycle(1)], S=[cycle(2)])
    assert told["goals"] == []
    assert "met" not in figures.table(told)


def test_the_table_says_where_it_was_measured_and_has_a_line_for_each_system() -> None:
    told = report(L=[cycle(10), cycle(12)], agent=[cycle(16.5), cycle(240)])
    assert figures.table(told) == TABLE


TABLE = """\
2026-11-25, x86_64, Linux 6.1.0, 2 CPUs; disks of scsi_debug
medians (95th percentiles) of 2 cycles, x ratio to L; noise: L's own times differ by up to x1.2

              kernel add           udev add              removed            own CPU        guest's CPU        RSS        PSS
          -> mounted, ms     -> mounted, ms  -> nothing left, ms                 ms                 ms         MB         MB
L      11.0 (12.0) x1.00  11.0 (12.0) x1.00    11.0 (12.0) x1.00  11.0 (12.0) x1.00  11.0 (12.0) x1.00  1.0 x1.00  1.0 x1.00
agent   128 (240) x11.66   128 (240) x11.66     128 (240) x11.66   128 (240) x11.66   128 (240) x11.66  1.0 x1.00  1.0 x1.00

L      what L is
agent  what agent is

missed  udev add -> mounted at most 2 x L: 11.66
missed  kernel add -> mounted at most 0.6 x L: 11.66
missed  removed -> nothing left at most 1.5 x L: 11.66
missed  own CPU at most 3 x L: 11.66
met     RSS at most 20 MB: 1.02
"""  # noqa: E501


def test_the_chart_has_a_bar_for_each_system_and_time() -> None:
    told = report(L=[cycle(10)], agent=[cycle(15)], S=[cycle(100)])
    root = ElementTree.fromstring(figures.chart(told))
    bars = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 3 * len(figures.TIMES)
    assert widths[0] * 10 == pytest.approx(widths[2], rel=0.01)


def test_twelve_cycles_come_in_turns_and_so_do_a_few() -> None:
    assert cycles.rounds(12) == [3, 3, 3, 3]
    assert cycles.rounds(4) == [3, 1]
    assert cycles.rounds(1) == [1]


def test_a_system_that_there_is_not_is_refused_with_those_there_are() -> None:
    assert cycles._systems("agent,L,agent") == ["agent", "L"]
    with pytest.raises(argparse.ArgumentTypeError, match="'X'; there are L, agent, S, P, Y, U"):
        cycles._systems("agent,X")


def test_an_event_is_read_the_kernels_and_udevs_alike() -> None:
    kernel = b"add@/devices/a/block/sda/sda1\0ACTION=add\0DEVTYPE=partition\0DEVNAME=sda1\0"
    udev = b"libudev\0\xfe\xed\xca\xfe\x28\0\0\0" + kernel[kernel.index(b"\0") :]
    for event in (kernel, udev):
        found = watcher.properties(event)
        assert (found["ACTION"], found["DEVTYPE"]) == ("add", "partition")


def test_a_key_that_waits_for_the_kernels_collector_is_none() -> None:
    line = b"%s I--Q---     %d perm 3f010000     0     0 %-9s caam-hotplug:9-1: 36\n"
    listed = line % (b"0a", 1, b"logon") + line % (b"0b", 0, b"logon") + line % (b"0c", 1, b"user")
    assert watcher.logon_keys(listed) == 1


def test_a_mount_is_known_by_its_place() -> None:
    mountinfo = (
        b"36 25 254:0 / /run/media/cartridge-01 rw,nosuid - ext4 /dev/dm-0 rw\n"
        b"25 1 0:5 / / rw - overlay none rw\n"
    )
    assert watcher.mount_points(mountinfo) == {"/run/media/cartridge-01", "/"}
