"""Whether a mapping has the key and the medium that it had before the machine slept.

A tagged key is of one session of the CAAM. A mapping under a key of an earlier session reads noise
without an error, and writes noise.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Final

from caam_hotplug import names
from caam_hotplug.errors import HotplugError
from caam_hotplug.kernel.medium_sample import Outcome, Sample
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
        self.is_due = False
        """Whether the mapping was suspended after the sleep, so that it is still to be compared."""
        self._is_too_late = False
        """Whether it has slept without a sample: one taken now may be of another key."""

    async def catch_up(self, mapping: Mapping) -> None:
        """Take the sample, if there is none yet; without one, nothing is known after a sleep.

        A read of a suspended mapping would wait, and everything after it.
        """
        if mapping.is_suspended or self._before is not None or self._is_too_late:
            return
        with suppress(HotplugError, OSError):
            self._before = await self._sample(mapping)

    async def run(self) -> None:
        """Compare. If key or medium are others, stop all I/O, and end the lifecycle.

        What is not known tears nothing down.
        """
        if self._before is None:
            self._is_too_late = True
            words = "%s: cannot compare it after the sleep: nothing was read of it before"
            log.warning(words, self._volume)
            return
        was_due = self.is_due
        try:
            outcome = await self._outcome(self._before)
        except (HotplugError, OSError) as error:
            log.warning("%s: cannot compare it after the sleep: %s", self._volume, error)
            return
        if outcome is None:
            if self.is_due and not was_due:
                words = "%s: suspended after the sleep: it is compared when it is resumed"
                log.warning(words, self._volume)
            return
        if outcome in _LOST_BY:
            self._operations.stop.set(_LOST_BY[outcome])
        level = logging.INFO if outcome is Outcome.SAME else logging.WARNING
        log.log(level, "%s: compared after the sleep: %s", self._volume, outcome.value)
        await self._operations.cut_off.done()

    async def _outcome(self, before: Sample) -> Outcome | None:
        kernel, call = self._kernel, self._operations.call
        look, uuid = kernel.find_mapping, names.dm_uuid(self._volume.id)
        # The kernel reports no suspend.
        mapping = await self._operations.dm("look for the mapping", look, uuid)
        self.is_due = mapping is not None and mapping.is_suspended
        if mapping is None or self.is_due:
            return None
        plain = await call("read the plaintext", kernel.plaintexts, mapping)
        if plain == before.plain and None not in plain:
            return Outcome.SAME
        # This opens the disk. Where a reader refuses to read before that, what is written from now
        # on reaches the medium that is in it.
        cipher = await call("read the ciphertext", kernel.ciphertexts, self._volume, mapping)
        if cipher.medium != before.cipher.medium:
            return Outcome.OTHER_MEDIUM
        return before.compared(await self._sample(mapping))

    async def _sample(self, mapping: Mapping) -> Sample:
        read = self._kernel.sample
        return await self._operations.call("read a sample", read, self._volume, mapping)
