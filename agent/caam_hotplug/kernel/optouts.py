"""Whether a board's udev rules may keep the agent off a device.

A rule that sets the property is known only by what udev tells of the device, once it has run all
rules. Where no rule there is does, there is nothing to wait for.
"""

from __future__ import annotations

import logging
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.kernel import watch

log = logging.getLogger(__name__)

_ROOTS: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
"""Where udevd looks for rules (udev(7)); the last one often leads to the one before."""
_SETS: Final = re.compile(
    rb"^[^#\n]*ENV\{%b\}\s*:?=\s*\"" % names.UDEV_OPT_OUT.encode(), re.MULTILINE
)


class OptOuts:
    """A board's udev rules under watch. Synchronization: loop only."""

    def __init__(self, roots: tuple[str, ...] = _ROOTS) -> None:
        """Until `look`, a rule may be there. If the rules cannot be watched, one always may."""
        self._directories = {(Path(root) / "udev/rules.d").resolve() for root in roots}
        self._watches: list[watch.Directory] = []
        self.may_be = True
        """Whether a rule sets the property, as far as is known."""
        with ExitStack() as held:
            held.callback(self.close)
            try:
                self._watches += map(watch.Directory, self._directories)
            except OSError as error:
                log.warning(
                    "cannot watch udev's rules: %s; media wait for what udev tells of them",
                    error.strerror,
                )
                return
            held.pop_all()

    def filenos(self) -> list[int]:
        """When one of them is readable, rules have changed, and are to be looked at again."""
        return [each.fileno() for each in self._watches]

    def close(self) -> None:
        """Nothing is watched any more."""
        for each in self._watches:
            each.close()
        self._watches.clear()

    def look(self, *, anew: bool = True) -> None:
        """What is known is what the rules say now; not `anew`: if they have changed."""
        changed = [each for each in self._watches if each.read()]
        if self._watches and (anew or changed):
            self.may_be = any(map(_sets, self._directories))


def _sets(directory: Path) -> bool:
    """Whether a rule in the directory sets the property, or cannot be read."""
    try:
        return any(_SETS.search(file.read_bytes()) for file in directory.glob("*.rules"))
    except FileNotFoundError:
        return False
    except OSError as error:
        log.warning("cannot read udev's rules: %s; media wait for what udev tells of them", error)
        return True
