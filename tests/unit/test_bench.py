"""How `make bench` presents its figures, and how it reads the kernel's events."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any
from xml.etree import ElementTree

import pytest

from bench import chart, figures, goals, measure, tables, turns, watcher
from bench.figures import CYCLES, IDLE, SCALING, START, STORM, Section


def sample(section: Section, times: float, memory: float = 1000) -> dict[str, Any]:
    """Return a sample in which everything took this long."""
    return {column.key: memory if column.unit == "MB" else times for column in section.columns}


def cycle(times: float, memory: float = 1000, left: Sequence[str] = ()) -> dict[str, Any]:
    """Return a sample of a cycle in which everything took this long, except for what was left."""
    last = {"removed_to_nothing_left": None if left else times, "removed_to_rest_gone": times}
    return {**sample(CYCLES, times, memory), **last, "left": list(left)}


def report_of(**samples: dict[str, list[dict[str, Any]]]) -> figures.Report:
    """Return a report of these sections, each with its systems' samples."""
    names = dict.fromkeys(name for systems in samples.values() for name in systems)
    return goals.with_verdicts(
        figures.with_figures(
            {
                "date": "2026-11-25",
                "medium": "disks of scsi_debug",
                "machine": {"kernel": "6.1.0", "architecture": "x86_64", "cpus": 2},
                "systems": {name: f"what {name} is" for name in names},
                "samples": samples,
            }
        )
    )


def report(**systems: list[dict[str, Any]]) -> figures.Report:
    """Return a report of cycles only."""
    return report_of(cycles=systems)


def own_cpu(found: figures.Report, system: str) -> figures.Figure:
    figure: figures.Figure = found["figures"]["cycles"][system]["own_cpu"]
    return figure


def verdicts(found: figures.Report) -> dict[str, bool]:
    return {f"{goal['title']} {goal['unit']}": goal["met"] for goal in found["goals"]}


@pytest.mark.parametrize(
    ("count", "percent", "rank"),
    [(1, 95, 1), (12, 95, 12), (20, 95, 19), (100, 95, 95), (4, 50, 2)],
)
def test_a_percentile_is_a_value_that_was_measured(count: int, percent: float, rank: int) -> None:
    values = [float(value) for value in range(count, 0, -1)]
    assert figures.percentile(values, percent) == rank


def test_a_system_has_its_median_and_its_ratio_to_the_limit_of_the_same_run() -> None:
    found = report(L=[cycle(10), cycle(20), cycle(90)], agent=[cycle(30), cycle(50), cycle(31)])
    assert own_cpu(found, "agent") == {
        "median": 31,
        "p95": 50,
        "min": 30,
        "max": 50,
        "ratio": 31 / 20,
    }
    assert found["noise"]["udev_add_to_mounted"] == 9


def test_without_the_limit_there_are_no_ratios_and_only_absolute_goals() -> None:
    found = report(agent=[cycle(30)])
    assert own_cpu(found, "agent")["ratio"] is None
    assert list(verdicts(found)) == ["RSS MB"]
    assert "noise unknown" in tables.tables(found)
    assert " x" not in tables.tables(found).splitlines()[4]


def test_one_cycle_gives_no_figure_of_the_noise() -> None:
    assert "noise unknown" in tables.tables(report(L=[cycle(10)], agent=[cycle(30)]))


def test_a_system_that_uses_nothing_has_no_ratio_to_nothing() -> None:
    found = report(L=[cycle(0)], S=[cycle(5)])
    assert own_cpu(found, "S")["ratio"] is None


def test_a_goal_is_met_up_to_its_bound_and_missed_beyond() -> None:
    found = report(L=[cycle(100)], agent=[cycle(150, memory=20e6 / 1024)])
    assert verdicts(found) == {
        "udev add -> mounted x L": True,
        "kernel add -> mounted x L": False,
        "removed -> nothing left x L": True,
        "own CPU x L": True,
        "RSS MB": True,
    }
    assert not verdicts(report(L=[cycle(1)], agent=[cycle(1, memory=20_000)]))["RSS MB"]


def test_a_system_that_mounts_before_udevs_event_has_met_the_goal_and_has_no_bar() -> None:
    found = report(L=[cycle(10)], agent=[cycle(-128)])
    assert verdicts(found)["udev add -> mounted x L"]
    assert "-128 (-128) x-12.80" in tables.tables(found)
    assert 'width="-' not in chart.chart(found)


def test_a_leftover_is_shown_as_never_gone_and_named_below_the_table() -> None:
    left = [cycle(30), cycle(50, left=["mapping"]), cycle(40, left=["mapping", "key"])]
    found = report(L=[cycle(10)], agent=left)
    figure = found["figures"]["cycles"]["agent"]["removed_to_nothing_left"]
    assert (figure["median"], figure["min"], figure["ratio"]) == (None, 30, None)
    assert not verdicts(found)["removed -> nothing left x L"]
    assert (
        "agent leaves behind, in 2 of 3 cycles: key, mapping; "
        "all else is gone after 40.0 (50.0) ms\n"
    ) in tables.tables(found)
    assert ">never<" in chart.chart(found)


def test_without_the_agent_its_goals_are_not_shown() -> None:
    found = report(L=[cycle(1)], S=[cycle(2)])
    assert found["goals"] == []
    assert "met" not in tables.tables(found)


def test_the_table_says_where_it_was_measured_and_has_a_line_for_each_system() -> None:
    found = report(L=[cycle(10), cycle(12)], agent=[cycle(16.5), cycle(240)])
    assert tables.tables(found) == TABLE


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
    found = report(L=[cycle(10)], agent=[cycle(15)], S=[cycle(100)])
    root = ElementTree.fromstring(chart.chart(found))
    bars = [e for e in root.iter() if e.tag.endswith("rect")][1:]
    widths = [float(bar.attrib["width"]) for bar in bars]
    assert len(widths) == 3 * len(figures.TIMES)
    assert widths[0] * 10 == pytest.approx(widths[2], rel=0.01)


def test_every_section_has_a_table_and_its_goals() -> None:
    found = report_of(
        cycles={"agent": [cycle(1)], "U": [cycle(10)], "nobus": [cycle(1, memory=17_000)]},
        storm={"L": [sample(STORM, 2000)], "agent": [sample(STORM, 2001), sample(STORM, 1999)]},
        scaling={"agent": [{**sample(SCALING, 100), "last": 121}]},
        start={"bare": [sample(START, 100)], "agent": [sample(START, 115)]},
        idle={"agent": [{"wake_ups": 3, "watchdogs": 2, "other_wake_ups": 1}]},
    )
    assert verdicts(found) == {
        "own CPU x U": True,
        "RSS MB": True,
        "RSS without D-Bus MB": False,
        "16 sticks -> all mounted x L": True,
        "64 disks -> all mounted x L": True,
        "kernel add -> mounted beside 63 others x beside no other": False,
        "exec -> READY x bare": True,
        "idle wake-ups that are not the watchdog's ": False,
    }
    text = tables.tables(found)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "agent 2.0 (2.0) x1.00 2.0 (2.0) x1.00 2.0 (2.0) x1.00" in lines
    assert "agent 3.0 2.0 1.0" in lines
    assert "missed  idle wake-ups that are not the watchdog's at most 0: 1.00\n" in text
    drawn = sum(c.drawn for s in (CYCLES, STORM, SCALING, START, IDLE) for c in s.columns)
    assert chart.chart(found).count('font-weight="bold"') == drawn


def test_systems_take_turns_with_few_and_with_many_cycles() -> None:
    assert turns.rounds(12) == [3, 3, 3, 3]
    assert turns.rounds(4) == [3, 1]
    assert turns.rounds(1) == [1]


def test_an_unknown_system_is_refused_with_the_known_ones() -> None:
    systems = measure._some_of(["L", "agent"], "is no system")
    assert systems("agent,L,agent") == ["agent", "L"]
    with pytest.raises(argparse.ArgumentTypeError, match="'X' is no system; there are L, agent"):
        systems("agent,X")


def test_events_of_the_kernel_and_of_udev_are_read_alike() -> None:
    kernel = b"add@/devices/a/block/sda/sda1\0ACTION=add\0DEVTYPE=partition\0DEVNAME=sda1\0"
    udev = b"libudev\0\xfe\xed\xca\xfe\x28\0\0\0" + kernel[kernel.index(b"\0") :]
    for event in (kernel, udev):
        found = watcher.properties(event)
        assert (found["ACTION"], found["DEVTYPE"]) == ("add", "partition")


def test_a_key_that_waits_for_the_kernels_collector_does_not_count() -> None:
    line = b"%s I--Q---     %d perm 3f010000     0     0 %-9s caam-hotplug:9-1: 36\n"
    listed = line % (b"0a", 1, b"logon") + line % (b"0b", 0, b"logon") + line % (b"0c", 1, b"user")
    assert watcher.logon_keys(listed) == 1


def test_a_mount_is_recognized_by_its_mount_point() -> None:
    mountinfo = (
        b"36 25 254:0 / /run/media/cartridge-01 rw,nosuid - ext4 /dev/dm-0 rw\n"
        b"25 1 0:5 / / rw - overlay none rw\n"
    )
    assert watcher.mount_points(mountinfo) == {"/run/media/cartridge-01", "/"}
