"""Whether the agent that stops hands its mounted media over to the next one.

It does at an upgrade of the package, whose script marks that, and at a restart of its unit. Then
they stay mounted, whatever the rules say of a stop.
"""

from __future__ import annotations

import logging
from typing import Final

from caam_hotplug import names
from caam_hotplug.dbus import systemd_units

log = logging.getLogger(__name__)

_WITHIN_S: Final = 2.0
"""How long a stop waits for the service manager to say whether it is a restart."""
_RESTARTS: Final = {"restart", "try-restart"}


def forget() -> None:
    """Remove the mark of an upgrade, which was for the agent before this one."""
    try:
        names.HAND_OVER.unlink(missing_ok=True)
    except OSError as error:
        log.warning("remove %s: %s; media stay mounted at each stop", names.HAND_OVER, error)


async def is_asked_for() -> bool:
    """Return whether media are to be handed over. A restart is one if systemd says so in time."""
    why = "an upgrade" if names.HAND_OVER.exists() else "a restart"
    is_so = why == "an upgrade" or await systemd_units.own_job(_WITHIN_S) in _RESTARTS
    if is_so:
        log.info("this is %s: mounted media stay mounted for the next run", why)
    return is_so
