"""See a medium go and come: the kernel's events, udev's, mounts, and what no event tells."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.kernel import uevents
from measure.replug.slot import Replugger
from measure.running import MeasureError

HAND_WITHIN_S: Final = 600
BEGINS_WITHIN_S: Final = 60
ENDS_WITHIN_S: Final = 30
"""After its first event; a second is long."""


@dataclass(frozen=True, slots=True)
class Awaited:
    """What is to be seen of a medium that goes or comes."""

    is_its: Callable[[uevents.Uevent], bool]
    """Is the event one of the medium's?"""
    events: Sequence[str]
    """Source and action. Nothing is looked at before the first one."""
    looks: Mapping[str, Callable[[], bool]]
    """Each is asked until it is so."""
    look_every_s: float
    """How often to look, if no event or mount comes."""


class Watch:
    """Sees one medium go and come, on the monotonic clock."""

    def __init__(self) -> None:
        self.name = ""
        """The kernel's name of what came or went last."""
        groups = {"kernel": uevents.KERNEL_GROUP, "udev": uevents.UDEV_GROUP}
        self._events = {source: uevents.Uevents(group) for source, group in groups.items()}
        self._mounts = Path("/proc/self/mountinfo").open("rb")  # noqa: SIM115  until the end
        self._poll = select.poll()
        for listener in self._events.values():
            self._poll.register(listener, select.POLLIN)
        self._poll.register(self._mounts, select.POLLPRI | select.POLLERR)

    def moments(self, by: Replugger, act: Callable[[], None], awaited: Awaited) -> dict[str, float]:
        """Have the medium go or come, and wait for all that is awaited.

        Returns: when it began, and when each was seen. Raises: MeasureError; KernelError.
        """
        list(self._seen(0, awaited))  # what came before is not of this time
        moments = {"begun": time.monotonic()}
        acting = by.thread.submit(act)
        first, missing = awaited.events[0], {*awaited.events, *awaited.looks}
        patience_s = BEGINS_WITHIN_S if by.slot else HAND_WITHIN_S
        while missing := missing - moments.keys():
            if acting.done():
                acting.result()
            if time.monotonic() > moments.get(first, moments["begun"] + patience_s) + ENDS_WITHIN_S:
                raise MeasureError(
                    f"these did not come in time: {', '.join(sorted(missing))}; "
                    f"journalctl -u {names.PROGRAM} may say why"
                )
            for moment in self._seen(awaited.look_every_s if first in moments else 1, awaited):
                moments.setdefault(moment, time.monotonic())
            if first in moments:
                for name in awaited.looks.keys() - moments.keys():
                    if awaited.looks[name]():
                        moments[name] = time.monotonic()
        acting.result()
        return moments

    def _seen(self, within_s: float, awaited: Awaited) -> Iterator[str]:
        self._poll.poll(within_s * 1000)
        for source, listener in self._events.items():
            for event in listener.read(1000):
                if event is not None and awaited.is_its(event):
                    self.name = event.name
                    yield f"{source} {event.action}"
