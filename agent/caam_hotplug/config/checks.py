"""What the value of a key must be, beyond its type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from caam_hotplug.config.match import Bytes, Match
from caam_hotplug.config.messages import found
from caam_hotplug.config.rules import MountSettings

_CIPHER: Final = re.compile(r"(capi:)?[a-z0-9()_,-]+-[a-z0-9]+(:[a-z0-9]+)?")
_KEY_OPTIONS: Final = re.compile(r"([a-z0-9]+=[A-Za-z0-9:_-]+( [a-z0-9]+=[A-Za-z0-9:_-]+)*)?")
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9 ._-]*")


def require_key_options(text: str) -> None:
    """Raises: ValueError, with what was expected, for what no trust source could take."""
    if not _KEY_OPTIONS.fullmatch(text):
        # Not repeated: one of them may be a password.
        raise ValueError(
            "expected options such as keyhandle=0x81000001, with values of A-Z a-z 0-9 : _ - and "
            "one space between two of them"
        )


def check(at: str, value: Any) -> None:
    """What a type cannot say. Raises: ValueError with what was expected."""
    match at.rsplit(".", 1)[-1]:
        case "blob_directory" | "mount_root" if not _is_plain(value):
            raise ValueError(f"expected an absolute path without .., found {found(str(value))}")
        case "cipher" if value != "auto" and not _CIPHER.fullmatch(value):
            raise ValueError(
                f"expected a cipher such as capi:tk(cbc(aes))-plain, found {found(value)}"
            )
        case "offset" | "iv_offset" if not 0 <= value < 1 << 63:
            raise ValueError(f"expected sectors from 0 on, found {found(value)}")
        case "min_size" | "max_size" if value is not None and not 0 <= value < 1 << 64:
            raise ValueError(f"expected bytes from 0 on, found {found(value)}")
        case "length" if not (value == 0 or 16 <= value <= 128):
            raise ValueError(f"expected bytes from 16 to 128, or 0, found {found(value)}")
        case "options" if isinstance(value, str):
            require_key_options(value)
        case "filesystem_options":
            _check_options(value)
        case _ if value == () and at.rsplit(".", 1)[-1] not in {"options", "flags"}:
            raise ValueError("expected at least one entry in the list")
        case "stuck_after_s" | "stop_within_s" | "unit_within_s" if not value > 0:
            raise ValueError(f"expected seconds above 0, found {value}")
        case "name" if isinstance(value, str) and not _NAME.fullmatch(value):
            raise ValueError(
                f"expected a name of A-Z a-z 0-9 . _ - and spaces, found {found(value)}"
            )


_OPTION: Final = re.compile(r"[A-Za-z0-9_.-]+(=[!-~]+)?")


def _check_options(by_filesystem: dict[str, tuple[str, ...]]) -> None:
    """Raises: ValueError for what fsconfig(2) could not take, or two that contradict each other."""
    for filesystem, options in by_filesystem.items():
        said: dict[str, str] = {}
        for option in options:
            if not _OPTION.fullmatch(option):
                expected = "expected an option such as errors=continue or noquota"
                raise ValueError(f"{expected} for {filesystem}, found {found(option)}")
            key = option.partition("=")[0]
            subject = "ro" if key == "rw" else key.removeprefix("no")
            if said.setdefault(subject, option) != option:
                contradicting = f"{found(said[subject])} and {found(option)}"
                raise ValueError(f"expected one of {contradicting} for {filesystem}, found both")


_TIMES: Final = ("noatime", "relatime", "strictatime")


def contradictions(described: object) -> Iterator[tuple[str, str]]:
    """Pairs of a key and a problem, for keys that are valid each but not together."""
    match described:
        case Match(min_size=Bytes() as least, max_size=Bytes() as most) if least > most:
            yield "min_size", f"expected at most max_size, which is {most}, found {least}"
        case MountSettings(options=options, read_only=read_only, filesystem_options=of):
            times = [option for option in _TIMES if option in options]
            if len(times) > 1:
                yield "options", f"expected one of {', '.join(_TIMES)}; found {', '.join(times)}"
            if read_only and any("rw" in asked for asked in of.values()):
                yield "read_only", "expected false, as filesystem_options ask for 'rw', found true"


def _is_plain(path: Path) -> bool:
    plain = path.is_absolute() and not str(path).startswith("//")  # which pathlib keeps
    return plain and ".." not in path.parts and str(path).isprintable()
