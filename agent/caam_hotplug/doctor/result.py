"""What a look at one condition has found. Values only."""

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
    """It cannot be told from here; `found` says why."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """A condition and how it is met."""

    status: Status
    found: str
    remedy: str = ""
    """What to do; empty where there is nothing to be done."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the report."""

    check: str
    """The check's name for programs; it does not change with the words."""
    subject: str
    verdict: Verdict


def ok(found: str) -> Verdict:
    """The condition is met."""
    return Verdict(Status.OK, found)


def warning(found: str, remedy: str) -> Verdict:
    """The condition is met in part."""
    return Verdict(Status.WARNING, found, remedy)


def failure(found: str, remedy: str) -> Verdict:
    """The condition is not met."""
    return Verdict(Status.FAILURE, found, remedy)


def unknown(found: str, remedy: str = "") -> Verdict:
    """Whether the condition is met cannot be told."""
    return Verdict(Status.UNKNOWN, found, remedy)
