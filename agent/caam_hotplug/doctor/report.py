"""Findings as people read them, as programs read them, and as an exit status."""

from __future__ import annotations

import json
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from caam_hotplug import __version__, names
from caam_hotplug.doctor.result import Result, Status
from caam_hotplug.errors import shown

_STATUS_WIDTH: Final = max(len(status.value) for status in Status)
_SUBJECT_WIDTH: Final = 18
_INDENT: Final = _STATUS_WIDTH + 2 + _SUBJECT_WIDTH + 2
_LEAST_TEXT_WIDTH: Final = 40

_COLOURS: Final = {
    Status.OK: "\x1b[32m",
    Status.WARNING: "\x1b[33m",
    Status.FAILURE: "\x1b[1;31m",
    Status.UNKNOWN: "\x1b[36m",
}
_PLAIN: Final = "\x1b[0m"

_EXIT: Final = {Status.OK: 0, Status.UNKNOWN: 0, Status.WARNING: 3, Status.FAILURE: 1}
_BADNESS: Final = [Status.OK, Status.UNKNOWN, Status.WARNING, Status.FAILURE]


@dataclass(frozen=True, slots=True)
class Page:
    """How lines are written: for a terminal of some width, or each as long as it is."""

    coloured: bool = False
    width: int | None = None

    def lines(self, finding: Result) -> Iterator[str]:
        """The finding, and below it the remedy."""
        status, verdict = finding.verdict.status, finding.verdict
        word = f"{status.value:<{_STATUS_WIDTH}}"
        if self.coloured:
            word = f"{_COLOURS[status]}{word}{_PLAIN}"
        first, *rest = self._broken(shown(verdict.found))
        yield f"{word}  {finding.subject:<{_SUBJECT_WIDTH}}  {first}"
        yield from (" " * _INDENT + line for line in rest)
        if verdict.remedy:
            remedy, *more = self._broken(shown(verdict.remedy), less=4)
            yield " " * _INDENT + f"--> {remedy}"
            yield from (" " * (_INDENT + 4) + line for line in more)

    def _broken(self, text: str, less: int = 0) -> list[str]:
        if self.width is None:
            return [text]
        width = max(self.width - _INDENT - less, _LEAST_TEXT_WIDTH)
        return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]


def summary(findings: Iterable[Result]) -> str:
    """The last line: how many of each status there are, worst first."""
    count = Counter(finding.verdict.status for finding in findings)
    words = {
        Status.FAILURE: "failure" if count[Status.FAILURE] == 1 else "failures",
        Status.WARNING: "warning" if count[Status.WARNING] == 1 else "warnings",
        Status.UNKNOWN: "unknown",
        Status.OK: "ok",
    }
    return ", ".join(f"{count[status]} {words[status]}" for status in words if count[status])


def worst(findings: Iterable[Result]) -> Status:
    """The worst status among the findings; `unknown` is no fault, but worse than `ok`."""
    return max((f.verdict.status for f in findings), key=_BADNESS.index, default=Status.OK)


def exit_status(findings: Iterable[Result]) -> int:
    """0 all ok as far as can be told, 3 warnings, 1 failures."""
    return _EXIT[worst(findings)]


def to_json(findings: Sequence[Result]) -> str:
    """The report as one JSON object."""
    listed = [
        {
            "check": finding.check,
            "subject": finding.subject,
            "status": finding.verdict.status.value,
            "found": finding.verdict.found,
            "remedy": finding.verdict.remedy or None,
        }
        for finding in findings
    ]
    whole = {
        "program": names.PROGRAM,
        "version": __version__,
        "worst": worst(findings).value,
        "findings": listed,
    }
    return json.dumps(whole, indent=2)
