"""Whether a board's udev rules may keep the agent off a device.

A rule that sets the property is known only by what udev tells of the device, once it has run all
rules. Where no rule there is does, there is nothing to wait for.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.kernel import inotify

log = logging.getLogger(__name__)

_ROOTS: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
"""Where udevd looks for rules (udev(7)); the last one often leads to the one before."""
_NAMES: Final = re.compile(
    rb"^(?!\s*#)[^\n]*\b%b\b(?!\}\s*[!=]=)" % names.UDEV_OPT_OUT.encode(), re.MULTILINE
)
"""A line that is no comment and names the property, but for whether it has some value."""


class OptOuts:
    """A board's udev rules, of which is known what they do. Synchronization: loop only."""

    def __init__(self, roots: tuple[str, ...] = _ROOTS) -> None:
        self._directories = {(Path(root) / "udev/rules.d").resolve() for root in roots}
        self._watched: dict[Path, inotify.Directory] = {}
        self._found = False

    def close(self) -> None:
        """Nothing is watched any more."""
        for each in self._watched.values():
            each.close()
        self._watched.clear()

    def may_be(self) -> bool:
        """Whether a rule sets the property, or may. What has not changed is not read again."""
        missing = [at for at in self._directories if at not in self._watched and at.is_dir()]
        try:
            for directory in missing:
                self._watched[directory] = inotify.Directory(directory)
        except OSError as error:
            log.warning(
                "cannot watch udev's rules: %s; media wait for what udev tells of them",
                error.strerror,
            )
            return True
        changed = [at for at, each in self._watched.items() if each.read()]
        if missing or changed:
            self._found = any(map(_sets, self._directories))
        return self._found


def _sets(directory: Path) -> bool:
    """Whether a rule in the directory sets the property, or cannot be read."""
    try:
        return any(map(_may_set, directory.glob("*.rules")))
    except OSError as error:
        return _unreadable(error)


def _may_set(file: Path) -> bool:
    try:
        return _NAMES.search(file.read_bytes().replace(b"\\\n", b"")) is not None
    except FileNotFoundError:  # a link that leads nowhere: udevd passes over it
        return False
    except OSError as error:
        return _unreadable(error)


def _unreadable(error: OSError) -> bool:
    log.warning("cannot read udev's rules: %s; media wait for what udev tells of them", error)
    return True
