"""Whether a board's udev rules may keep the agent off a device.

A rule that sets the property shows only in udev's report of the device, once it has run all rules.
If no rule sets it, or imports what may set it, there is nothing to wait for.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Final

from caam_hotplug import names
from caam_hotplug.kernel import inotify
from caam_hotplug.kernel.udev_imports import may_set_unnamed

log = logging.getLogger(__name__)

_ROOTS: Final = ("/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib")
"""udevd's folders of rules (udev(7)); the last one is often a link to the one before."""
_NAMES: Final = re.compile(
    rb"^(?!\s*#)[^\n]*\b%b\b(?!\}\s*[!=]=)" % names.UDEV_OPT_OUT.encode(), re.MULTILINE
)
"""A line that is no comment and names the property, except in a comparison."""


class UdevRules:
    """A board's udev rules, watched for changes. Synchronization: loop only."""

    def __init__(self, roots: tuple[str, ...] = _ROOTS) -> None:
        self._directories = {(Path(root) / "udev/rules.d").resolve() for root in roots}
        self._watched: dict[Path, inotify.Directory] = {}
        self._found = False

    def close(self) -> None:
        """Stop watching."""
        for each in self._watched.values():
            each.close()
        self._watched.clear()

    def may_opt_out(self) -> bool:
        """Return whether a rule sets the property, or may. Only changed directories are read."""
        missing = [at for at in self._directories if at not in self._watched and at.is_dir()]
        try:
            for directory in missing:
                self._watched[directory] = inotify.Directory(directory)
        except OSError as error:
            log.warning(
                "cannot watch udev's rules: %s; every medium waits until udev has reported it",
                error.strerror,
            )
            return True
        changed = [at for at, each in self._watched.items() if each.read()]
        if missing or changed:
            self._found = any(map(_sets, self._directories))
        return self._found


def _sets(directory: Path) -> bool:
    """Return whether a rule in the directory sets the property, or cannot be read."""
    try:
        return any(map(_may_set, directory.glob("*.rules")))
    except OSError as error:
        return _warn_unreadable(error)


def _may_set(file: Path) -> bool:
    try:
        rules = file.read_bytes().replace(b"\\\n", b"")
        return _NAMES.search(rules) is not None or may_set_unnamed(rules.decode(errors="replace"))
    except FileNotFoundError:  # a dangling link, which udevd ignores
        return False
    except OSError as error:
        return _warn_unreadable(error)


def _warn_unreadable(error: OSError) -> bool:
    """Log the error; return that a rule may set the property."""
    log.warning(
        "cannot read udev's rules: %s; every medium waits until udev has reported it", error
    )
    return True
