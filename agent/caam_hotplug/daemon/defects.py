"""Defects of the agent: logged, so that one costs no other volume its mount."""

from __future__ import annotations

import logging
from collections.abc import Coroutine
from typing import Any

from caam_hotplug.model import State
from caam_hotplug.systemd import journal
from caam_hotplug.volume.phases import Broken
from caam_hotplug.volume.record import Record

log = logging.getLogger(__name__)


def log_defect(words: str, **of: object) -> None:
    """Log the exception that is being handled. `of`: fields of the journal entry."""
    log.exception(words, extra=journal.event(journal.Event.DEFECT, **of))


async def guarded(work: Coroutine[Any, Any, None], words: str, **of: object) -> None:
    """Have the work done; if a defect ends it, log that and raise nothing."""
    try:
        await work
    except Exception:  # noqa: BLE001  whatever it is, it must not end the other volumes' service
        log_defect(f"{words}: a defect of the agent ended it", **of)


async def end_of_service(record: Record) -> None:
    """Log the exception that has ended a volume's lifecycle, and wait until the volume departs."""
    log_defect(f"{record.volume}: a defect ended its service", volume=record.volume)
    _publish(record, State.FAILED)
    await record.stop.until(lambda: False)
    if record.stop.medium_gone:
        await record.cut_off.done()
        _publish(record, State.REMOVED_UNSAFELY)


def _publish(record: Record, state: State) -> None:
    record.phase = Broken()
    record.status.forget_mapping()
    record.status.publish(state, "a defect of the agent; the journal has the details")
