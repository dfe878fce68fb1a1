"""Whether the agent that stops hands its mounted media over to the next one.

It does at an upgrade of the package, whose script marks that, and at a restart of its unit. Then
they stay mounted, whatever the rules say of a stop. When the machine goes down none stays.
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


async def keeps_media() -> bool | None:
    """Return whether mounted media stay at this stop, whatever the rules say; None if they say it.

    A restart is one if systemd says so in time. While the machine goes down there is no next run.
    """
    job = await systemd_units.own_job(_WITHIN_S)
    if job == systemd_units.SHUTDOWN:
        return False
    is_upgrade = names.HAND_OVER.exists()
    if not is_upgrade and job not in _RESTARTS:
        return None
    why = "an upgrade" if is_upgrade else "a restart"
    log.info("this is %s: mounted media stay mounted for the next run", why)
    return True
