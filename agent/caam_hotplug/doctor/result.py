"""The result of one check."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Status(Enum):
    """How a condition is met."""

    OK = "ok"
    WARNING = "warning"
    """The agent works, but not as safely or as surely as it could."""
    FAILURE = "failure"
    """The agent cannot do its work, or not for some of the media."""
    UNKNOWN = "unknown"
    """The check cannot tell; `found` says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How a condition is met."""

    status: Status
    found: str
    remedy: str = ""
    """Empty where there is nothing to do."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report."""

    check: str
    """The check's name for programs, which does not change with the words."""
    subject: str
    verdict: Verdict


def ok(found: str) -> Verdict:
    """Return the verdict for a condition that is met."""
    return Verdict(Status.OK, found)


def warning(found: str, remedy: str) -> Verdict:
    """Return the verdict for a condition that is met in part."""
    return Verdict(Status.WARNING, found, remedy)


def failure(found: str, remedy: str) -> Verdict:
    """Return the verdict for a condition that is not met."""
    return Verdict(Status.FAILURE, found, remedy)


def unknown(found: str, remedy: str = "") -> Verdict:
    """Return the verdict of a check that cannot tell."""
    return Verdict(Status.UNKNOWN, found, remedy)
