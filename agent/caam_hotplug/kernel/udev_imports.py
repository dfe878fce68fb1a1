"""Which udev rules may set a property of a medium without naming it.

`ENV{KEY}=`, IMPORT{db} and IMPORT{cmdline} name the property. But IMPORT{program} and IMPORT{file}
take whatever a program or a file says, and so does the builtin `hwdb`; the other builtins set
properties of their own. IMPORT{parent} has a pattern for what it takes from the device above
(udev(7)).

A rule that depends on something else than what is the same for all media may apply to one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Final

from caam_hotplug import names

_KNOWN_PROGRAMS: Final = {
    "ata_id", "bcache-export-cached", "blkid", "btrfs", "cdrom_id", "dasdinfo", "dmraid",
    "dmsetup", "drbdadm", "edd_id", "fstab_import", "kpartx_id", "lvm", "mdadm", "mpath_id",
    "mtd_probe", "multipath", "path_id", "probe-bcache", "scsi_id", "usb_id", "zvol_id",
}  # fmt: skip
"""Of the rules of udev, LVM, md and their like: they set ID_*, LVM_*, MD_* and so on."""
_TOKEN: Final = re.compile(
    r"(?P<key>[A-Z]+)(?:\{(?P<of>[^}]*)\})?\s*(?P<operator>==|!=|\+=|-=|:=|=)\s*"
    r'[a-z]?"(?P<value>(?:[^"\\]|\\.)*)"'
)
_CANDIDATE: Final = re.compile(r'IMPORT(\{(program|file|parent)\}|\{builtin\}\s*=+\s*"hwdb|\s*=)')
_NO_MEDIUM: Final = re.compile(r"(dm-|md|ram|zram|sr|fd|nbd)[\d\[*?]|event|input|js|mouse")
"""Begins a pattern for names of devices that the agent leaves alone (sysfs.NEVER_MEDIA), or of
input devices, whose rules ask for nothing else before they ask the hardware database."""
_OF_MEDIA: Final = {
    "SUBSYSTEM": ("block",),
    "ACTION": ("add", "change"),
    "ENV{DEVTYPE}": ("disk", "partition"),
    "ENV{MODALIAS}": ("",),
}
"""What is the same for all media, or one of a few values. A block device has no MODALIAS."""


@dataclass(frozen=True, slots=True)
class _Token:
    """A match or an assignment of a rule."""

    key: str
    of: str | None
    operator: str
    value: str

    @property
    def is_met(self) -> bool | None:
        """Whether the match is met by every medium, or by none; None if that depends."""
        if self.operator not in {"==", "!="}:
            return True
        name = self.key if self.of is None else f"{self.key}{{{self.of}}}"
        patterns = self.value.split("|")
        if name == "KERNEL":
            found = {False if all(map(_NO_MEDIUM.match, patterns)) else None}
        elif name in _OF_MEDIA:
            found = {any(fnmatchcase(v, p) for p in patterns) for v in _OF_MEDIA[name]}
        else:
            return None
        if len(found) > 1 or None in found:
            return None
        return (self.operator == "==") is (True in found)

    @property
    def may_set_anything(self) -> bool:
        """Whether it imports properties that nobody can name beforehand."""
        if self.key != "IMPORT" or self.of in {"db", "cmdline"}:
            return False
        if self.of == "parent":
            return fnmatchcase(names.UDEV_OPT_OUT, self.value)
        command = self.value.split(maxsplit=1)[0] if self.value.strip() else ""
        if self.of == "builtin":
            return command == "hwdb"
        return self.of != "program" or command.rpartition("/")[2] not in _KNOWN_PROGRAMS


def may_set_unnamed(rules: str) -> bool:
    """Return whether a rule of this file may set any property of a medium."""
    if _CANDIDATE.search(rules) is None:
        return False
    return any(token.may_set_anything for rule in _applying(rules) for token in rule)


def _applying(rules: str) -> Iterator[list[_Token]]:
    """Yield the rules that may apply to a medium, without those that all media jump over."""
    label = None
    for line in rules.replace("\\\n", "").splitlines():
        if line.lstrip().startswith("#"):
            continue
        rule = [_Token(m["key"], m["of"], m["operator"], m["value"]) for m in _TOKEN.finditer(line)]
        if label is not None and not any(t.key == "LABEL" and t.value == label for t in rule):
            continue
        label = None
        met = {token.is_met for token in rule}
        if False in met:
            continue
        if met == {True}:
            label = next((token.value for token in rule if token.key == "GOTO"), None)
        yield rule
