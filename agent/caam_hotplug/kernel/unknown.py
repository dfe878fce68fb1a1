"""Devices that could not be looked at, such as for want of a file descriptor, to be asked again."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final

from caam_hotplug.errors import UnknownError
from caam_hotplug.model import Event

log = logging.getLogger(__name__)

Check = Callable[[], Iterator[Event]]
"""Yields the events of a device; it raises UnknownError before the first, or not at all."""

FIRST_DELAY_S: Final = 1.0
LONGEST_DELAY_S: Final = 30.0


@dataclass(slots=True)
class _Question:
    """What is not known of one device."""

    at: float
    """Monotonic time at which it is asked again."""
    delay_s: float = FIRST_DELAY_S
    checks: dict[str, Check] = field(default_factory=dict)
    """The checks to repeat, by who has reported it."""


class Unknown:
    """The devices of which it is not known whether they are there. Synchronization: loop only."""

    def __init__(self) -> None:
        self._questions: dict[str, _Question] = {}

    def check(
        self, name: str, reporter: str, check: Check, *, replaces: bool = True
    ) -> list[Event]:
        """Return the events that a check of the device yields; none yet without an answer now.

        `replaces`: whether this check is the one to repeat, not an earlier one without an answer.
        """
        question = self._questions.get(name)
        if question is not None and not replaces:
            check = question.checks.get(reporter, check)
        try:
            events = list(check())
        except UnknownError as error:
            self._note(name, reporter, check, error)
            return []
        self._answer(name, reporter)
        return events

    def times(self) -> list[float]:
        """Return the monotonic times at which to ask again; none while all is known."""
        return [question.at for question in self._questions.values()]

    def again(self) -> list[Event]:
        """Ask again what is due, and return the events of what is known now."""
        events: list[Event] = []
        now = time.monotonic()
        for name, question in list(self._questions.items()):
            if question.at <= now:
                question.delay_s = min(2 * question.delay_s, LONGEST_DELAY_S)
                question.at = now + question.delay_s
                for reporter, check in list(question.checks.items()):
                    events += self.check(name, reporter, check)
        return events

    def _note(self, name: str, reporter: str, check: Check, error: UnknownError) -> None:
        question = self._questions.get(name)
        if question is None:
            question = self._questions[name] = _Question(time.monotonic() + FIRST_DELAY_S)
            log.warning("%s; it counts as it was, and is looked at again", error)
        question.checks[reporter] = check

    def _answer(self, name: str, reporter: str) -> None:
        question = self._questions.get(name)
        if question is None:
            return
        question.checks.pop(reporter, None)
        if not question.checks:
            del self._questions[name]
            log.info("look at %s: the kernel answers again", name)
