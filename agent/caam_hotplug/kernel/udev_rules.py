"""Whether a board's udev rules may keep the agent off a device.

A rule that sets the property shows only in udev's report of the device, once it has run all rules.
If no rule sets it, or imports what may set it, there is nothing to wait for.
"""

from __future__ import annotations

import logging
import os
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
        self._found: bool | None = None
        """Whether a rule sets the property; None until all are read."""
        self._is_said = False
        """Whether it is said that they cannot be watched or read."""

    def close(self) -> None:
        """Stop watching."""
        for each in self._watched.values():
            each.close()
        self._watched.clear()

    def may_opt_out(self) -> bool:
        """Return whether a rule sets the property, or may. Only changed directories are read.

        What cannot be watched or read now may have such a rule, and is tried again at each call.
        """
        try:
            if self._has_changed():
                self._found = None
            if self._found is None:
                self._found = any(map(_sets, self._directories))
        except OSError as error:
            if not self._is_said:
                log.warning("%s; every medium waits until udev has reported it", error)
            self._is_said = True
            return True
        self._is_said = False
        return self._found

    def _has_changed(self) -> bool:
        """Return whether a directory has come or changed since the last call. Raises: OSError."""
        changed = False
        for at in self._directories:
            try:
                if at in self._watched:
                    changed |= bool(self._watched[at].read())
                elif at.is_dir():
                    self._found = None  # also if a later one cannot be watched
                    self._watched[at] = inotify.Directory(at)
            except OSError:
                self._found = None
                if at in self._watched:
                    self._watched.pop(at).close()
                raise
        return changed


def _sets(directory: Path) -> bool:
    """Return whether a rule in the directory sets the property. Raises: OSError."""
    try:
        names_there = os.listdir(directory)  # noqa: PTH208  glob() hides errors
    except (FileNotFoundError, NotADirectoryError):
        return False
    return any(_sets_in(directory / name) for name in names_there if name.endswith(".rules"))


def _sets_in(file: Path) -> bool:
    try:
        rules = file.read_bytes().replace(b"\\\n", b"")
        return _NAMES.search(rules) is not None or may_set_unnamed(rules.decode(errors="replace"))
    except FileNotFoundError:  # a dangling link, which udevd ignores
        return False
