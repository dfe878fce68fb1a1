"""Checks of the value of a key, beyond its type; the JSON Schema is made from them too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

from caam_hotplug.config.match import Bytes, Match, is_exact
from caam_hotplug.config.messages import found
from caam_hotplug.config.rules import NAME_OF_LABEL, MountSettings, Rule


class Check(Protocol):
    """Condition on a value that has the right type."""

    def require(self, value: Any) -> None:
        """Raises: ValueError with what was expected."""
        ...


class Form:
    """A pattern that a whole text must match."""

    def __init__(self, pattern: str, expected: str, *, is_secret: bool = False) -> None:
        """`is_secret`: the text may hold a password, so no message repeats it."""
        self.pattern: Final = re.compile(pattern)
        self._expected = expected
        self._is_secret = is_secret

    def require(self, value: str) -> None:
        """Raises: ValueError with what was expected."""
        if not self.pattern.fullmatch(value):
            shown = "" if self._is_secret else f", found {found(value)}"
            raise ValueError(f"expected {self._expected}{shown}")


class Limits:
    """The least and the greatest value of a whole number."""

    def __init__(self, least: int, greatest: int, expected: str, *, or_zero: bool = False) -> None:
        """`or_zero`: 0 is allowed below the least value."""
        self.least: Final = least
        self.greatest: Final = greatest
        self.or_zero: Final = or_zero
        self._expected = expected

    def require(self, value: int) -> None:
        """Raises: ValueError with what was expected."""
        if not (self.least <= value <= self.greatest or (self.or_zero and value == 0)):
            raise ValueError(f"expected {self._expected}, found {found(value)}")


class AboveZero:
    """A time above zero, in seconds."""

    def require(self, value: float) -> None:
        """Raises: ValueError with what was expected."""
        if not value > 0:
            raise ValueError(f"expected seconds above 0, found {value}")


class AbsolutePath:
    """A path that begins at the root and never goes up."""

    def require(self, value: Path) -> None:
        """Raises: ValueError with what was expected."""
        plain = value.is_absolute() and not str(value).startswith("//")  # which pathlib keeps
        if not plain or ".." in value.parts or not str(value).isprintable():
            raise ValueError(f"expected an absolute path without .., found {found(str(value))}")


class FilesystemOptions:
    """For each filesystem, options that fsconfig(2) takes and that do not contradict each other."""

    option: Final = re.compile(r"[A-Za-z0-9_.-]+(=[!-~]+)?")

    def require(self, value: dict[str, tuple[str, ...]]) -> None:
        """Raises: ValueError with what was expected."""
        for filesystem, options in value.items():
            by_subject: dict[str, str] = {}
            for option in options:
                if not self.option.fullmatch(option):
                    expected = "expected an option such as errors=continue or noquota"
                    raise ValueError(f"{expected} for {filesystem}, found {found(option)}")
                key = option.partition("=")[0]
                subject = "ro" if key == "rw" else key.removeprefix("no")
                first = by_subject.setdefault(subject, option)
                if first != option:
                    both = f"{found(first)} and {found(option)}"
                    raise ValueError(f"expected one of {both} for {filesystem}, found both")


KEY_OPTIONS: Final = Form(
    r"([a-z0-9]+=[A-Za-z0-9:_-]+( [a-z0-9]+=[A-Za-z0-9:_-]+)*)?",
    "options such as keyhandle=0x81000001, with values of A-Z a-z 0-9 : _ - and one space between "
    "two of them",
    is_secret=True,
)
_CIPHER: Final = Form(
    r"auto|(capi:)?[a-z0-9()_,-]+-[a-z0-9]+(:[a-z0-9]+)?",
    "a cipher such as capi:tk(cbc(aes))-plain",
)
_NAME: Final = Form(r"[A-Za-z0-9_][A-Za-z0-9 ._-]*", "a name of A-Z a-z 0-9 . _ - and spaces")
_SIZE: Final = Limits(0, (1 << 64) - 1, "bytes from 0 on")
_SECTORS: Final = Limits(0, (1 << 63) - 1, "sectors from 0 on")

CHECKS: Final[dict[str, Check]] = {
    "blob_directory": AbsolutePath(),
    "mount_root": AbsolutePath(),
    "stuck_after_s": AboveZero(),
    "stop_within_s": AboveZero(),
    "rule.name": _NAME,
    "rule.unit_within_s": AboveZero(),
    "rule.match.min_size": _SIZE,
    "rule.match.max_size": _SIZE,
    "rule.key.length": Limits(16, 128, "bytes from 16 to 128, or 0", or_zero=True),
    "rule.key.options": KEY_OPTIONS,
    "rule.crypt.cipher": _CIPHER,
    "rule.crypt.offset": _SECTORS,
    "rule.crypt.iv_offset": _SECTORS,
    "rule.mount.filesystem_options": FilesystemOptions(),
}
"""By the key's path in a file; `rule` stands for each of the rules."""

MAY_BE_EMPTY: Final = frozenset({"rule", "rule.crypt.flags", "rule.mount.options"})
"""Lists that may have no entry: nothing is asked for then. Elsewhere nothing would fit."""

_INDEX: Final = re.compile(r"\[\d+\]")


def check(at: str, value: Any) -> None:
    """Raises: ValueError, with what was expected, for a value that its type allows and `at` not."""
    key = _INDEX.sub("", at)
    if value == () and key not in MAY_BE_EMPTY:
        raise ValueError("expected at least one entry in the list")
    if key in CHECKS:
        CHECKS[key].require(value)


_ROOTS_OWN: Final = ("nosuid", "nodev")
_WHERE_ONLY_ROOT_WRITES: Final = (
    "expected {} in it: without, who makes a medium could be root here. Only a rule that matches "
    "removable = false, and has mount.path or matches a partuuid without wildcards, may leave it "
    "out"
)
_TIMES: Final = ("noatime", "relatime", "strictatime")


def contradictions(table: object) -> Iterator[tuple[str, str]]:
    """Yield a key and a problem for keys that are valid each but not together."""
    match table:
        case Match(min_size=Bytes() as least, max_size=Bytes() as greatest) if least > greatest:
            yield "min_size", f"expected at most max_size, which is {greatest}, found {least}"
        case Rule(match=match, mount=mount):
            missing = [option for option in _ROOTS_OWN if option not in mount.options]
            names_it = mount.path is not None or is_exact(match.partuuid)
            if missing and not (match.removable is False and names_it):
                yield "mount.options", _WHERE_ONLY_ROOT_WRITES.format(" and ".join(missing))
        case MountSettings(options=options, read_only=read_only, filesystem_options=by_filesystem):
            if table.path is not None and table.name != NAME_OF_LABEL:
                yield "path", "expected only one of name and path, found both"
            times = [option for option in _TIMES if option in options]
            if len(times) > 1:
                yield "options", f"expected one of {', '.join(_TIMES)}; found {', '.join(times)}"
            if read_only and any("rw" in asked for asked in by_filesystem.values()):
                yield "read_only", "expected false, as filesystem_options ask for 'rw', found true"
