"""Results as lines for operators, as JSON for programs, and as an exit status."""

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

    def lines(self, result: Result) -> Iterator[str]:
        """Yield the result's lines, and the remedy's below."""
        status, verdict = result.verdict.status, result.verdict
        word = f"{status.value:<{_STATUS_WIDTH}}"
        if self.coloured:
            word = f"{_COLOURS[status]}{word}{_PLAIN}"
        first, *rest = self._broken(shown(verdict.found))
        yield f"{word}  {result.subject:<{_SUBJECT_WIDTH}}  {first}"
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


def summary(results: Iterable[Result]) -> str:
    """Return the last line: how many of each status there are, worst first."""
    count = Counter(result.verdict.status for result in results)
    words = {
        Status.FAILURE: "failure" if count[Status.FAILURE] == 1 else "failures",
        Status.WARNING: "warning" if count[Status.WARNING] == 1 else "warnings",
        Status.UNKNOWN: "unknown",
        Status.OK: "ok",
    }
    return ", ".join(f"{count[status]} {words[status]}" for status in words if count[status])


def worst(results: Iterable[Result]) -> Status:
    """Return the worst status; `unknown` is no fault, but worse than `ok`."""
    return max((result.verdict.status for result in results), key=_BADNESS.index, default=Status.OK)


def exit_status(results: Iterable[Result]) -> int:
    """Return 1 for a failure, else 3 for a warning, else 0."""
    return _EXIT[worst(results)]


def to_json(results: Sequence[Result]) -> str:
    """Return the report as one JSON object."""
    listed = [
        {
            "check": result.check,
            "subject": result.subject,
            "status": result.verdict.status.value,
            "found": result.verdict.found,
            "remedy": result.verdict.remedy or None,
        }
        for result in results
    ]
    whole = {
        "program": names.PROGRAM,
        "version": __version__,
        "worst": worst(results).value,
        "findings": listed,
    }
    return json.dumps(whole, indent=2)
