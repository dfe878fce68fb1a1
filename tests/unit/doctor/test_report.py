"""Results as lines, as JSON and as an exit status."""

from __future__ import annotations

import io
import json
import os

import pytest

from caam_hotplug.doctor import report, runner
from caam_hotplug.doctor.result import Result, failure, ok, unknown, warning

GOOD = Result("kernel", "kernel", ok("Linux 6.6"))
UNKNOWN = Result("caam-state", "CAAM state", unknown("cannot be parsed", "ask U-Boot"))
DOUBTFUL = Result("automounters", "other automounters", warning("udisksd runs", "keep it off"))
BAD = Result("caam-device", "CAAM device", failure("is not there", "use NXP's kernel"))


@pytest.mark.parametrize(
    ("results", "status"),
    [
        ([], 0),
        ([GOOD], 0),
        ([GOOD, UNKNOWN], 0),
        ([DOUBTFUL, UNKNOWN], 3),
        ([BAD, DOUBTFUL], 1),
        ([GOOD, BAD], 1),
    ],
)
def test_the_exit_status_is_that_of_the_worst_result(results: list[Result], status: int) -> None:
    assert report.exit_status(results) == status


def test_a_result_is_a_line_and_its_remedy_stands_below_the_words() -> None:
    first, second = report.Page().lines(BAD)
    assert first == "failure  CAAM device         is not there"
    assert second == "                             --> use NXP's kernel"
    assert first.index("is not") == second.index("-->")


def test_no_subject_is_wider_than_its_column() -> None:
    starts = {
        next(report.Page().lines(Result(check.name, check.subject, ok("x")))).index("x", 28)
        for check in runner.CHECKS
    }
    assert len(starts) == 1


def test_lines_are_broken_for_a_terminal_between_words() -> None:
    words = "a result of many words " * 8
    lines = list(report.Page(width=80).lines(Result("x", "subject", warning(words, words))))
    assert len(lines) > 4
    assert max(map(len, lines)) <= 80
    assert " ".join(" ".join(lines).split()).count("a result of many words") == 16


def test_what_a_terminal_would_act_on_is_escaped() -> None:
    (line,) = report.Page().lines(Result("x", "y", ok("a\x1b[2Jb\nc")))
    assert "\x1b" not in line
    assert "\n" not in line


def test_the_last_line_counts_the_worst_first() -> None:
    line = report.summary([GOOD, BAD, DOUBTFUL, GOOD, UNKNOWN, DOUBTFUL])
    assert line == "1 failure, 2 warnings, 1 unknown, 2 ok"


def test_json_has_every_result_and_the_worst_status() -> None:
    parsed = json.loads(report.to_json([GOOD, DOUBTFUL]))
    assert parsed["program"] == "caam-hotplug"
    assert parsed["worst"] == "warning"
    assert parsed["findings"] == [
        {
            "check": "kernel", "subject": "kernel", "status": "ok", "found": "Linux 6.6",
            "remedy": None,
        },
        {
            "check": "automounters", "subject": "other automounters", "status": "warning",
            "found": "udisksd runs", "remedy": "keep it off",
        },
    ]  # fmt: skip


@pytest.mark.parametrize(("no_color", "coloured"), [("", True), ("1", False)])
def test_colours_are_for_a_terminal_that_wants_them(
    no_color: str, coloured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    ours, theirs = os.openpty()
    with os.fdopen(ours, "w") as _, os.fdopen(theirs, "w") as terminal:
        page = runner.page_for(terminal)
    assert any("\x1b" in line for line in page.lines(BAD)) == coloured


def test_a_pipe_gets_no_colours_and_whole_lines() -> None:
    assert runner.page_for(io.StringIO()) == report.Page()


def test_the_names_of_checks_differ() -> None:
    listed = [check.name for check in runner.CHECKS]
    assert len(listed) == len(set(listed)) > 20
