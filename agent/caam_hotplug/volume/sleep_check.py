"""Whether a mapping has the key and the medium that it had before the machine slept.

A tagged key is of one session of the CAAM. A mapping under a key of an earlier session reads noise
without an error, and writes noise.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from functools import partial
from typing import Final

from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.medium_sample import Outcome, Plaintexts, Sample
from caam_hotplug.model import Mapping, Volume
from caam_hotplug.volume.operations import Operations
from caam_hotplug.volume.stop_signal import Reason

log = logging.getLogger(__name__)

_LOST_BY: Final = {
    Outcome.OTHER_KEY: Reason.OTHER_KEY,
    Outcome.OTHER_MEDIUM: Reason.OTHER_MEDIUM,
}


class SleepCheck:
    """A sample of one mapping, compared after each sleep. Synchronization: loop only."""

    def __init__(self, operations: Operations, volume: Volume) -> None:
        self._operations = operations
        self._kernel = operations.kernel
        self._volume = volume
        self._before: Sample | None = None

    async def remember(self, mapping: Mapping) -> None:
        """Take the sample; without one, nothing is known after a sleep."""
        with suppress(HotplugError, OSError):
            plain, cipher = await self._operations.each(
                ("read the plaintext", partial(self._kernel.plaintexts, mapping)),
                ("read the ciphertext", partial(self._kernel.ciphertexts, self._volume, mapping)),
            )
            self._before = Sample(plain, cipher)

    async def run(self, mapping: Mapping) -> None:
        """Compare. If key or medium are others, stop all I/O, and end the lifecycle.

        What is not known tears nothing down.
        """
        try:
            outcome = await self._outcome(mapping)
        except (HotplugError, OSError) as error:
            log.warning("%s: cannot compare it after the sleep: %s", self._volume, error)
            return
        level = logging.INFO if outcome is Outcome.SAME else logging.WARNING
        log.log(level, "%s: compared after the sleep: %s", self._volume, outcome.value)

    async def _outcome(self, mapping: Mapping) -> Outcome:
        before = self._before
        if before is None:
            return Outcome.UNKNOWN
        plain = await self._plaintexts(mapping)
        if plain == before.plain and None not in plain:
            return Outcome.SAME
        await self._operations.dm("hold the mapping", self._kernel.hold_mapping, mapping.name)
        try:
            words, read = "read the ciphertext", self._kernel.ciphertexts
            cipher = await self._operations.call(words, read, self._volume, mapping)
            outcome = before.compared(Sample(plain, cipher))
            if None not in plain or outcome is Outcome.OTHER_MEDIUM:
                self._stop_if_lost(outcome)
                return outcome
        finally:
            await self._end_hold(mapping)
        # A reader refuses to read until its disk is opened anew; a lost CCM key does so for good.
        outcome = before.compared(Sample(await self._plaintexts(mapping), cipher))
        self._stop_if_lost(outcome)
        await self._end_hold(mapping)
        return outcome

    async def _plaintexts(self, mapping: Mapping) -> Plaintexts:
        words, read = "read the plaintext", self._kernel.plaintexts
        return await self._operations.call(words, read, mapping)

    def _stop_if_lost(self, outcome: Outcome) -> None:
        if outcome in _LOST_BY:
            self._operations.stop.set(_LOST_BY[outcome])

    async def _end_hold(self, mapping: Mapping) -> None:
        """Let the mapping's I/O pass; or fail, if nothing may be written to its medium."""
        if self._operations.stop.medium_gone:
            await self._operations.cut_off.require()
        else:
            activate = self._kernel.activate_mapping
            await self._operations.dm("let its I/O pass", activate, mapping.name)
